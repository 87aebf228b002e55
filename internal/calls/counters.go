package calls

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// The counters are a file of fixed size that every program maps, adds to and leaves:
// no lock is waited for, and one that dies in between has at most counted too little.
//
//	magic, then for each program, verb and result:
//	    sum of the durations in nanoseconds, calls by duration (17)
//
// The size stays: programs of other releases write the same file. Of the last program
// there is room for ADD, DEL and CHECK, of which it has the first two.
const (
	countersFile = "cni.counters"
	magic        = uint64(0x6f766c63616c6c31)
	fileSize     = 8192
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

// fits reports whether the file has room for the counters that begin there.
func fits(offset int) bool { return 8*(offset+words) <= fileSize }

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
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return
	}
	if st.Size == 0 && unix.Ftruncate(fd, fileSize) != nil || st.Size != 0 && st.Size != fileSize {
		return
	}
	add(fd, at, uint64(c.Took), at+1+bucketOf(c.Took))
}

// add adds took to the word at sum and one to the word at bucket.
func add(fd, sum int, took uint64, bucket int) {
	b, err := unix.Mmap(fd, 0, fileSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return
	}
	defer unix.Munmap(b)
	// A page that the file system has no room for, or that somebody has cut off.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() { _ = recover() }()
	word := func(i int) *uint64 { return (*uint64)(unsafe.Pointer(&b[8*i])) }
	if atomic.LoadUint64(word(0)) != magic {
		atomic.StoreUint64(word(0), magic)
	}
	atomic.AddUint64(word(sum), took)
	atomic.AddUint64(word(bucket), 1)
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
	b, err := conf.ReadRegular(path, fileSize)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if len(b) != fileSize || binary.NativeEndian.Uint64(b) != magic {
		return nil, fmt.Errorf("read %s: it is not what the CNI programs write; remove it", path)
	}
	word := func(i int) uint64 { return binary.NativeEndian.Uint64(b[8*i:]) }
	var out []Count
	for p, program := range programNames {
		for v, verb := range verbNames {
			for r, result := range resultNames {
				at := offset(p, v, r)
				if !fits(at) {
					continue
				}
				c := Count{Program: program, Verb: verb, Result: result, Sum: time.Duration(word(at))}
				for i := range c.Calls {
					c.Calls[i] = word(at + 1 + i)
				}
				if c.Total() > 0 {
					out = append(out, c)
				}
			}
		}
	}
	return out, nil
}
