package conf_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// names lists a directory.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "87-dcos.conflist")
	for _, content := range []string{"old and longer", "new"} {
		if err := conf.WriteFile(path, []byte(content), 0o640, ""); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != content {
			t.Errorf("content %q, %v; want %q", got, err, content)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o640 {
		t.Errorf("mode %v, %v; want 0640 whatever the umask", info.Mode(), err)
	}
	if diff := cmp.Diff([]string{"87-dcos.conflist"}, names(t, dir)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
}

// TestWriteFileReplacesForReaders: a reader sees one content or the other, and
// one that has the file open keeps what it opened.
func TestWriteFileReplacesForReaders(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	contents := []string{strings.Repeat("a", 100_000), strings.Repeat("b", 50_000)}
	write := func(s string) {
		if err := conf.WriteFile(path, []byte(s), 0o644, ""); err != nil {
			t.Error(err)
		}
	}
	write(contents[0])
	opened, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()

	var writer sync.WaitGroup
	done := make(chan struct{})
	writer.Go(func() {
		defer close(done)
		for i := range 40 {
			write(contents[i%2])
		}
	})
	for reading := true; reading; {
		select {
		case <-done:
			reading = false
		default:
		}
		if got, err := os.ReadFile(path); err != nil || !slices.Contains(contents, string(got)) {
			t.Fatalf("read %d bytes, %v: a part of a file", len(got), err)
		}
	}
	writer.Wait()
	buf := make([]byte, 8)
	if _, err := opened.ReadAt(buf, 0); err != nil || string(buf) != "aaaaaaaa" {
		t.Errorf("the file opened first now reads %q, %v", buf, err)
	}
}

// TestWriteFileTemporaryName watches a directory while files are written to it:
// runtimes pick up every name with one of their suffixes.
func TestWriteFileTemporaryName(t *testing.T) {
	dir, tmp := t.TempDir(), t.TempDir()
	created := func(dir string, write func()) []string {
		t.Helper()
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE); err != nil {
			t.Fatal(err)
		}
		write()
		buf := make([]byte, 4096)
		n, err := unix.Read(fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for at := 0; at < n; {
			length := int(buf[at+12]) // the name's, padded; names here are short
			out = append(out, strings.TrimRight(string(buf[at+16:at+16+length]), "\x00"))
			at += 16 + length
		}
		return out
	}
	for _, name := range []string{"87-dcos.conflist", "dcos.conf", "lease.json"} {
		path := filepath.Join(dir, name)
		write := func(tmpDir string) func() {
			return func() {
				if err := conf.WriteFile(path, []byte("{}"), 0o644, tmpDir); err != nil {
					t.Error(err)
				}
			}
		}
		got := created(dir, write(""))
		if len(got) != 1 {
			t.Errorf("%s: files created in its directory: %q, want one temporary file", name, got)
		}
		for _, g := range got {
			if ext := filepath.Ext(g); ext == ".conf" || ext == ".conflist" || ext == ".json" {
				t.Errorf("%s: the temporary file is called %s", name, g)
			}
		}
		if got := created(dir, write(tmp)); len(got) != 0 {
			t.Errorf("%s: files created in its directory: %q, want them elsewhere", name, got)
		}
	}
	if left := names(t, tmp); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestWriteFileFailureLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	occupied := filepath.Join(dir, "occupied")
	if err := os.MkdirAll(filepath.Join(occupied, "child"), 0o755); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct{ path, tmpDir string }{
		"a directory is in its place": {occupied, ""},
		"no such directory":           {filepath.Join(dir, "absent", "a"), dir},
		"no temporary directory":      {filepath.Join(dir, "a"), filepath.Join(dir, "absent")},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := conf.WriteFile(tt.path, []byte("x"), 0o644, tt.tmpDir)
			if err == nil || !strings.Contains(err.Error(), "write "+tt.path) {
				t.Errorf("WriteFile = %v, want an error that names the file", err)
			}
			// The agent logs a problem once: the next error has to be recognised.
			if again := conf.WriteFile(tt.path, []byte("x"), 0o644, tt.tmpDir); again == nil || again.Error() != err.Error() {
				t.Errorf("WriteFile = %v, and before it was %v", again, err)
			}
			if diff := cmp.Diff([]string{"occupied"}, names(t, dir)); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
		})
	}
}

func TestJSONFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease.json")
	var got conf.Lease
	if err := conf.ReadJSON(path, &got); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ReadJSON of no file = %v, want fs.ErrNotExist", err)
	}
	want := lease(1, "172.17.0.4")
	if err := conf.WriteJSON(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := conf.ReadJSON(path, &got); err != nil || got.AgentIP != want.AgentIP || got.Epoch != want.Epoch {
		t.Errorf("ReadJSON = %+v, %v", got, err)
	}
	if data, err := os.ReadFile(path); err != nil || !strings.HasSuffix(string(data), "}\n") {
		t.Errorf("file %q, %v; want a newline at the end", data, err)
	}
	if err := os.WriteFile(path, []byte(`{"epoch":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := conf.ReadJSON(path, &got); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("ReadJSON of half a file = %v, want an error that names it", err)
	}
	if err := conf.WriteJSON(path, func() {}, 0o600); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("WriteJSON of a function = %v, want an error that names the file", err)
	}
}

// Many files are replaced at once, and one that cannot be is the only one that is not.
func TestWriteFiles(t *testing.T) {
	dir := t.TempDir()
	var files []conf.File
	for i := range 50 {
		files = append(files, conf.File{Path: filepath.Join(dir, fmt.Sprint(i)), Data: fmt.Append(nil, "content ", i), Perm: 0o640})
	}
	const bad, taken = 5, 7
	files[bad].TmpDir = filepath.Join(dir, "nowhere")
	if err := os.Mkdir(files[taken].Path, 0o755); err != nil { // a file cannot take its place
		t.Fatal(err)
	}
	for i, err := range conf.WriteFiles(files) {
		if i == bad || i == taken {
			if err == nil || !strings.Contains(err.Error(), files[i].Path) {
				t.Errorf("file %d: error %v, want one that names it", i, err)
			}
			continue
		}
		b, readErr := os.ReadFile(files[i].Path)
		if err != nil || readErr != nil || string(b) != fmt.Sprint("content ", i) {
			t.Errorf("file %d: %v, %v, %q", i, err, readErr, b)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != len(files)-1 {
		t.Errorf("%d entries are in the directory, want %d: no temporary file", len(entries), len(files)-1)
	}
}
