package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The browser gets a file that only its owner can read, and no link on its command
// line, which others on the host see.
func TestOpenLink(t *testing.T) {
	dir := t.TempDir()
	script := "#!/bin/sh\nstat -c '%a' \"$1\" >" + dir + "/mode\necho \"$@\" >" + dir + "/arguments\ncp \"$1\" " + dir + "/new && mv " + dir + "/new " + dir + "/copy\n"
	if err := os.WriteFile(filepath.Join(dir, "xdg-open"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	const link = "http://127.0.0.1:1234/open/SECRET"
	var stderr bytes.Buffer
	clean, err := openLink(t.Context(), link, &stderr)
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(dir, "copy")); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal("xdg-open was not called")
		}
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	if text := read("copy"); !strings.Contains(text, "url="+link+"\"") {
		t.Errorf("the file has %s", text)
	}
	arguments := read("arguments")
	if strings.Contains(arguments, "SECRET") || read("mode") != "600" {
		t.Errorf("it was called with %s, of mode %s", arguments, read("mode"))
	}
	clean()
	if _, err := os.Stat(arguments); !os.IsNotExist(err) {
		t.Errorf("the file is left behind: %v", err)
	}
	t.Setenv("PATH", t.TempDir())
	clean, err = openLink(t.Context(), link, &stderr)
	clean()
	if err == nil {
		t.Error("without xdg-open there is no error")
	}
}
