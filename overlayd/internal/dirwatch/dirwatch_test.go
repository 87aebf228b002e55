package dirwatch

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func expect(t *testing.T, w *Watch, what string) {
	t.Helper()
	select {
	case <-w.Events():
	case <-time.After(10 * time.Second):
		t.Fatalf("%s: no event", what)
	}
	for quiet := false; !quiet; { // several may come of one change
		select {
		case <-w.Events():
		case <-time.After(50 * time.Millisecond):
			quiet = true
		}
	}
}

func TestEvents(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	path := filepath.Join(dir, "file")
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.Mkdir(dir, 0o755))
	w := New()
	defer w.Close()
	check(w.Add(dir))
	expect(t, w, "watched")
	check(w.Add(dir))
	select {
	case <-w.Events():
		t.Error("an event of a directory that is watched already")
	case <-time.After(50 * time.Millisecond):
	}
	check(os.WriteFile(path, []byte("a"), 0o644))
	expect(t, w, "written")
	check(os.Rename(path, path+"2"))
	expect(t, w, "renamed")
	check(os.Remove(path + "2"))
	expect(t, w, "removed")

	check(os.RemoveAll(dir))
	expect(t, w, "directory removed")
	if err := w.Add(dir); err == nil {
		t.Error("a directory that is not there is watched")
	}
	check(os.Mkdir(dir, 0o755))
	check(w.Add(dir))
	expect(t, w, "watched again")
	check(os.WriteFile(path, []byte("a"), 0o644))
	expect(t, w, "written again")

	check(os.Rename(dir, dir+"2"))
	expect(t, w, "directory moved away")
	check(os.Mkdir(dir, 0o755))
	check(w.Add(dir))
	expect(t, w, "another is watched")
	check(os.WriteFile(path, []byte("b"), 0o644))
	expect(t, w, "written in the new one")
	if err := w.Add(path); err == nil {
		t.Error("a file is watched as a directory")
	}
}

// TestNames: files that are written are no event where names are watched, but for the
// one whose contents are.
func TestNames(t *testing.T) {
	dir := t.TempDir()
	path, other := filepath.Join(dir, "file"), filepath.Join(dir, "other")
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	quiet := func(w *Watch, what string) {
		t.Helper()
		select {
		case <-w.Events():
			t.Errorf("%s: an event", what)
		case <-time.After(50 * time.Millisecond):
		}
	}
	w := New()
	defer w.Close()
	check(w.AddFile(path))
	check(os.WriteFile(path, []byte("a"), 0o644))
	check(os.WriteFile(other, []byte("a"), 0o644))
	check(w.AddNames(dir))
	expect(t, w, "watched")
	check(w.AddFile(path))
	quiet(w, "a file is watched")

	check(os.WriteFile(other, []byte("b"), 0o644))
	quiet(w, "another file written")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	check(err)
	_, err = f.WriteString("b")
	check(err)
	quiet(w, "written and not closed")
	check(f.Close())
	expect(t, w, "written")
	check(os.Chmod(path, 0o600))
	expect(t, w, "another mode")

	check(os.Rename(other, path))
	expect(t, w, "another one in its place")
	check(w.AddFile(path))
	quiet(w, "watched again")
	check(os.WriteFile(path, []byte("c"), 0o644))
	expect(t, w, "the other one written")
	check(os.Symlink(other, filepath.Join(dir, "link")))
	expect(t, w, "a link made")
}
