package conf

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// File is one file that WriteFiles replaces.
type File struct {
	Path string
	Data []byte
	Perm fs.FileMode
	// TmpDir has the temporary file and must be on the same file system; empty means
	// the directory of Path.
	TmpDir string
}

// WriteFile replaces path with data so that a reader, or a machine that loses
// power, sees the old content or the new and never a part: temporary file in
// tmpDir, fsync, rename, fsync of the directory. tmpDir is described with File. The
// temporary name never ends in .conf, .conflist or .json, so that no runtime
// picks it up.
func WriteFile(path string, data []byte, perm fs.FileMode, tmpDir string) error {
	return WriteFiles([]File{{Path: path, Data: data, Perm: perm, TmpDir: tmpDir}})[0]
}

// syncers is how many files WriteFiles writes at once. A file system that is asked
// to make many of them last does so in one go.
const syncers = 16

// WriteFiles is WriteFile for many files, each of which may fail by itself: the
// errors are in the order of the files. One after the other they take milliseconds
// each, which is what the disk needs.
func WriteFiles(files []File) []error {
	errs, temporary := make([]error, len(files)), make([]string, len(files))
	if len(files) == 1 { // a CNI program does not start a thread for it
		temporary[0], errs[0] = files[0].stage()
		return rename(files, temporary, errs)
	}
	var group sync.WaitGroup
	turn := make(chan struct{}, syncers)
	for i := range files {
		turn <- struct{}{}
		group.Go(func() {
			defer func() { <-turn }()
			temporary[i], errs[i] = files[i].stage()
		})
	}
	group.Wait()
	return rename(files, temporary, errs)
}

// rename puts the temporary files that there are into their places.
func rename(files []File, temporary []string, errs []error) []error {
	renamed := map[string][]int{} // by directory
	for i, f := range files {
		if errs[i] != nil {
			continue
		}
		if err := os.Rename(temporary[i], f.Path); err != nil {
			os.Remove(temporary[i])
			errs[i] = fmt.Errorf("write %s: %w", f.Path, withoutPath(err))
			continue
		}
		dir := filepath.Dir(f.Path)
		renamed[dir] = append(renamed[dir], i)
	}
	for dir, in := range renamed {
		if err := syncDir(dir); err != nil {
			for _, i := range in {
				errs[i] = err
			}
		}
	}
	return errs
}

// stage writes the temporary file and waits until it lasts.
func (f File) stage() (temporary string, err error) {
	dir := f.TmpDir
	if dir == "" {
		dir = filepath.Dir(f.Path)
	}
	t, err := os.CreateTemp(dir, "."+filepath.Base(f.Path)+".*.tmp")
	if err != nil {
		return "", fmt.Errorf("write %s: temporary file in %s: %w", f.Path, dir, withoutPath(err))
	}
	_, err = t.Write(f.Data)
	if err == nil {
		err = t.Chmod(f.Perm)
	}
	if err == nil {
		err = t.Sync()
	}
	if closing := t.Close(); err == nil {
		err = closing
	}
	if err != nil {
		os.Remove(t.Name())
		return "", fmt.Errorf("write %s: %w", f.Path, withoutPath(err))
	}
	return t.Name(), nil
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
