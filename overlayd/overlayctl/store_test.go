package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/cli"
)

// A backup of a running coordinator, put back, and moved once more.
func TestBackupRestoreCopy(t *testing.T) {
	url := cluster(t)
	dir := t.TempDir()
	file, restored, moved := filepath.Join(dir, "b"), "bbolt:"+filepath.Join(dir, "r.db"), "bbolt:"+filepath.Join(dir, "m.db")
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"backup", file}, file + ": cluster "},
		{[]string{"restore", file, "--to", restored}, "restored cluster "},
		{[]string{"store", "copy", "--from", restored, "--to", moved}, "all of them were read back and are the same"},
	} {
		code, stdout, stderr := ctl(t, map[string]string{cli.EnvName("coordinator"): url}, tt.args...)
		if code != 0 || !strings.Contains(stdout, tt.want) || stderr != "" {
			t.Fatalf("%v: code %d, %s%s", tt.args, code, stdout, stderr)
		}
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the backup: %v, %v", info.Mode(), err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	broken := filepath.Join(dir, "broken")
	if err := os.WriteFile(broken, text[:len(text)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"restore", file, "--to", restored}, "not empty"},
		{[]string{"restore", broken, "--to", "bbolt:" + filepath.Join(dir, "x.db")}, "damaged or none"},
		{[]string{"restore", file}, "--to is missing"},
		{[]string{"store", "copy", "--from", "bbolt:" + filepath.Join(dir, "none.db"), "--to", "bbolt:" + filepath.Join(dir, "x.db")}, "no such file"},
		{[]string{"store", "copy", "--from", moved}, "--from and --to"},
		{[]string{"backup", filepath.Join(dir, "no", "such", "directory")}, "no such file"},
	} {
		code, _, stderr := ctl(t, map[string]string{cli.EnvName("coordinator"): url}, tt.args...)
		if code == 0 || !strings.Contains(stderr, tt.want) {
			t.Errorf("%v: code %d, %s, want %q", tt.args, code, stderr, tt.want)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "x.db")); err == nil {
		t.Error("a bad backup touched the store")
	}
}

// A backup replaces a file, also behind a link, and nothing else.
func TestBackupReplacesFilesAlone(t *testing.T) {
	env := map[string]string{cli.EnvName("coordinator"): cluster(t)}
	dir := t.TempDir()
	t.Chdir(dir)
	for name, target := range map[string]string{"latest": "first", "nowhere": "gone", "null": os.DevNull} {
		if err := os.Symlink(target, name); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.WriteFile("first", []byte("old"), 0o600), os.Mkdir("dir", 0o700), syscall.Mkfifo("fifo", 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"-", "dir", "fifo", "null", "nowhere"} {
		before, _ := os.Lstat(name) // "-" is not there
		code, _, stderr := ctl(t, env, "backup", name)
		after, err := os.Lstat(name)
		if code != 2 || before == nil != (err != nil) || before != nil && before.Mode() != after.Mode() {
			t.Errorf("%s: code %d, %s, is now %v (%v)", name, code, stderr, after, err)
		}
	}
	code, _, stderr := ctl(t, env, "backup", "latest")
	text, err := os.ReadFile("first")
	if fi, lerr := os.Lstat("latest"); code != 0 || err != nil || lerr != nil || string(text) == "old" || fi.Mode()&os.ModeSymlink == 0 {
		t.Errorf("behind a link: code %d, %s, %q, %v, %v", code, stderr, text, err, lerr)
	}
}
