package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// At every moment there is a login, the old one or the new one: its directory is never
// deleted for another one to take its place.
func TestLoginIsReplacedInOneStep(t *testing.T) {
	parent := t.TempDir()
	fresh, dir := filepath.Join(parent, "overlay.new"), filepath.Join(parent, "overlay")
	write := func(path, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(path, 0o700), os.WriteFile(filepath.Join(path, "key"), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	read := func() string { b, _ := os.ReadFile(filepath.Join(dir, "key")); return string(b) }
	write(fresh, "first")
	if err := replaceDir(fresh, dir); err != nil || read() != "first" {
		t.Fatalf("where there was none: %v, %q", err, read())
	}
	write(fresh, "second")
	watch, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, parent, unix.IN_DELETE); err != nil {
		t.Fatal(err)
	}
	if err := replaceDir(fresh, dir); err != nil || read() != "second" {
		t.Fatalf("in the place of another: %v, %q", err, read())
	}
	events := make([]byte, 4096)
	if n, err := unix.Read(watch, events); n > 0 || !errors.Is(err, unix.EAGAIN) {
		t.Errorf("something was deleted: %q, %v", bytes.TrimRight(events[:max(n, 0)], "\x00"), err)
	}
}
