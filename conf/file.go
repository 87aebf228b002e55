package conf

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// WriteFile replaces path with data so that a reader, or a machine that loses
// power, sees the old content or the new and never a part: temporary file in
// tmpDir, fsync, rename, fsync of the directory. tmpDir must be on the same
// file system; empty means the directory of path. The temporary name never ends
// in .conf, .conflist or .json, so that no runtime picks it up.
func WriteFile(path string, data []byte, perm fs.FileMode, tmpDir string) error {
	if tmpDir == "" {
		tmpDir = filepath.Dir(path)
	}
	f, err := os.CreateTemp(tmpDir, "."+filepath.Base(path)+".*.tmp")
	if err != nil {
		return fmt.Errorf("write %s: temporary file in %s: %w", path, tmpDir, withoutPath(err))
	}
	fail := func(err error) error {
		f.Close()
		os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", path, withoutPath(err))
	}
	if _, err := f.Write(data); err != nil {
		return fail(err)
	}
	if err := f.Chmod(perm); err != nil {
		return fail(err)
	}
	if err := f.Sync(); err != nil {
		return fail(err)
	}
	if err := f.Close(); err != nil {
		return fail(err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fail(err)
	}
	return syncDir(filepath.Dir(path))
}

// withoutPath takes the temporary name out of an error: it is another one each
// time, and who logs a problem once would take it for a new one.
func withoutPath(err error) error {
	var path *fs.PathError
	var link *os.LinkError
	switch {
	case errors.As(err, &path):
		return fmt.Errorf("%s: %w", path.Op, path.Err)
	case errors.As(err, &link):
		return fmt.Errorf("%s: %w", link.Op, link.Err)
	}
	return err
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

// WriteJSON is WriteFile of v's JSON form, with a newline at the end.
func WriteJSON(path string, v any, perm fs.FileMode) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return WriteFile(path, append(b, '\n'), perm, "")
}

// MaxStateFile is how large a published document may be. One of a host with a
// thousand overlays has half a megabyte.
const MaxStateFile = 16 << 20

// maxJSON is the most that ReadJSON reads. The largest document of ours lists
// 65,536 peers, 600 bytes each.
const maxJSON = 256 << 20

// ReadFile is ReadRegular for what a CNI program reads: the published document
// and files of /proc.
func ReadFile(path string) ([]byte, error) { return ReadRegular(path, MaxStateFile) }

// ReadRegular is os.ReadFile for a file that others may have replaced: it does
// not wait for whoever writes to a FIFO, and refuses what is no regular file or
// has more than most bytes. It does without the poller, which takes system calls
// and a thread to start, for the sake of programs that live for milliseconds.
func ReadRegular(path string, most int64) ([]byte, error) {
	fail := func(op string, err error) ([]byte, error) {
		return nil, &fs.PathError{Op: op, Path: path, Err: err}
	}
	fd, err := retry(func() (int, error) {
		return unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	})
	if err != nil {
		return fail("open", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	switch err := unix.Fstat(fd, &st); {
	case err != nil:
		return fail("read", err)
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fail("read", errors.New("no regular file; move it away"))
	case st.Size > most:
		return fail("read", fmt.Errorf("it has %d bytes, more than %d; move it away", st.Size, most))
	}
	b := make([]byte, 0, max(st.Size+1, 4096)) // files of /proc have the size 0
	for {
		n, err := retry(func() (int, error) { return unix.Read(fd, b[len(b):cap(b)]) })
		switch {
		case err != nil:
			return fail("read", err)
		case n == 0:
			return b, nil
		case int64(len(b)+n) > most:
			return fail("read", fmt.Errorf("it has more than %d bytes; move it away", most))
		}
		b = b[:len(b)+n]
		b = slices.Grow(b, 1)
	}
}

// retry repeats a system call that a signal has interrupted.
func retry(call func() (int, error)) (int, error) {
	for {
		if n, err := call(); err != unix.EINTR {
			return n, err
		}
	}
}

// ReadJSON reads the JSON document at path, a regular file of sane size, into v.
// The error of a file that is not there satisfies
// errors.Is(err, fs.ErrNotExist).
func ReadJSON(path string, v any) error {
	b, err := ReadRegular(path, maxJSON)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}
