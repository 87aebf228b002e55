package calls

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// The counters are a file of parts, each of which one program at a time adds to while
// it has the part locked. No lock is waited for: a program takes the first part that
// is free, and counts nothing where none is. One that dies in between has counted too
// little. A part is:
//
//	magic (in the first one), then for each program, verb and result:
//	    sum of the durations in nanoseconds, calls by duration (17)
//
// What was never written is zero, or behind the end of the file. It is not mapped:
// a mapping costs a call more than all of its reads and writes. Of the last program
// there is room for ADD, DEL and CHECK, of which it has the first two.
const (
	countersFile = "cni.counters"
	magic        = uint64(0x6f766c63616c6c31)
	partSize     = 8192
	parts        = 16
	words        = 1 + bucketCount
)

var (
	programNames = [...]string{"m-overlay", "d-overlay", "overlay-ipam", "overlay-netavark"}
	verbNames    = [...]string{"ADD", "DEL", "CHECK", "GC", "STATUS"}
	resultNames  = [...]string{"ok", "again", "failed"}
)

// The results: "again" is CNI's code 11, try again later.
const (
	resultOK = iota
	resultAgain
	resultFailed
)

// bucketCount is that of a histogram from half a millisecond to 16 s, and one more
// for what is longer.
const (
	bucketCount = 17
	firstBucket = 500 * time.Microsecond
)

// Bucket is the upper bound of a bucket; the last one, bucketCount-1, has none.
func Bucket(i int) time.Duration { return firstBucket << i }

func bucketOf(d time.Duration) int {
	for i := range bucketCount - 1 {
		if d <= Bucket(i) {
			return i
		}
	}
	return bucketCount - 1
}

func (c Call) result() int {
	switch c.Code {
	case 0:
		return resultOK
	case 11:
		return resultAgain
	}
	return resultFailed
}

// offset is where the counters of a program, a verb and a result begin, in words.
func offset(program, verb, result int) int {
	return 1 + ((program*len(verbNames)+verb)*len(resultNames)+result)*words
}

// fits reports whether a part has room for the counters that begin there.
func fits(offset int) bool { return 8*(offset+words) <= partSize }

func (c Call) count(dir string) {
	program, verb := slices.Index(programNames[:], c.Program), slices.Index(verbNames[:], c.Verb)
	if program < 0 || verb < 0 {
		return
	}
	at := offset(program, verb, c.result())
	if !fits(at) {
		return
	}
	fd, err := unix.Open(filepath.Join(dir, countersFile), unix.O_RDWR|c.create()|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if ours(fd) {
		add(fd, at, c.Took)
	}
}

// ours reports whether the file is one of counters, and makes an empty one that.
func ours(fd int) bool {
	var b [8]byte
	switch n, err := unix.Pread(fd, b[:], 0); {
	case err != nil: // a pipe
		return false
	case n == 0:
		binary.NativeEndian.PutUint64(b[:], magic)
		n, _ = unix.Pwrite(fd, b[:], 0)
		return n == len(b)
	default:
		return n == len(b) && binary.NativeEndian.Uint64(b[:]) == magic
	}
}

// add adds a call to the counters at a word of the first part that is free. The lock
// ends with the descriptor.
func add(fd, at int, took time.Duration) {
	for part := range int64(parts) {
		lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: part, Len: 1}
		if unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lock) != nil {
			continue
		}
		var b [8 * words]byte
		from := part*partSize + int64(8*at)
		if _, err := unix.Pread(fd, b[:], from); err != nil {
			return
		}
		plus := func(word int, n uint64) {
			binary.NativeEndian.PutUint64(b[8*word:], binary.NativeEndian.Uint64(b[8*word:])+n)
		}
		plus(0, uint64(took))
		plus(1+bucketOf(took), 1)
		_, _ = unix.Pwrite(fd, b[:], from)
		return
	}
}

// Count is how often one program was called with one verb and one result since the
// host was booted.
type Count struct {
	Program, Verb, Result string
	Sum                   time.Duration
	// Calls is by duration: at most Bucket(i), and more than the one before.
	Calls [bucketCount]uint64
}

// Total is the number of calls.
func (c Count) Total() (n uint64) {
	for _, calls := range c.Calls {
		n += calls
	}
	return n
}

// Read returns what was counted in a run directory, without what never happened. No
// call was made if the file is not there.
func Read(dir string) ([]Count, error) {
	path := filepath.Join(dir, countersFile)
	b, err := conf.ReadRegular(path, parts*partSize)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if len(b) == 0 {
		return nil, nil // it is made just now
	}
	if len(b) < 8 || binary.NativeEndian.Uint64(b) != magic {
		return nil, fmt.Errorf("read %s: it is not what the CNI programs write; remove it", path)
	}
	b = append(b, make([]byte, parts*partSize-len(b))...)
	sum := func(word int) (n uint64) {
		for part := range parts {
			n += binary.NativeEndian.Uint64(b[part*partSize+8*word:])
		}
		return n
	}
	var out []Count
	for p, program := range programNames {
		for v, verb := range verbNames {
			for r, result := range resultNames {
				at := offset(p, v, r)
				if !fits(at) {
					continue
				}
				c := Count{Program: program, Verb: verb, Result: result, Sum: time.Duration(sum(at))}
				for i := range c.Calls {
					c.Calls[i] = sum(at + 1 + i)
				}
				if c.Total() > 0 {
					out = append(out, c)
				}
			}
		}
	}
	return out, nil
}
