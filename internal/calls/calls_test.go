package calls

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func call(verb string, code uint, took time.Duration) Call {
	c := Call{Program: "d-overlay", Verb: verb, Network: "dcos", ContainerID: "c1", IfName: "eth0",
		Began: time.Date(2026, 11, 27, 9, 30, 1, 5e6, time.UTC), Took: took, Code: code}
	if code != 0 {
		c.Error = "no\naddress \"left\""
	}
	return c
}

func TestLog(t *testing.T) {
	dir := t.TempDir()
	Record(dir, call("ADD", 0, 2710*time.Microsecond))
	Record(dir, call("STATUS", 0, time.Millisecond)) // asked for all the time
	Record(dir, call("STATUS", 50, time.Millisecond))
	Record(dir, Call{Program: "m-overlay", Verb: "GC", Network: "n", Began: call("", 0, 0).Began})
	want := `time=2026-11-27T09:30:01.005Z program=d-overlay verb=ADD result=ok took=2.71ms network=dcos container=c1 ifname=eth0
time=2026-11-27T09:30:01.005Z program=d-overlay verb=STATUS result=failed took=1.00ms network=dcos container=c1 ifname=eth0 code=50 err="no\naddress \"left\""
time=2026-11-27T09:30:01.005Z program=m-overlay verb=GC result=ok took=0.00ms network=n
`
	got, err := os.ReadFile(filepath.Join(dir, logFile))
	if err != nil || string(got) != want {
		t.Errorf("log (%v):\n%s\nwant\n%s", err, got, want)
	}
	st, err := os.Stat(filepath.Join(dir, logFile))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

// TestLogIsBounded: whoever writes how much at the same time, two files of a
// megabyte are all there is, and no line is torn or lost but the oldest.
func TestLogIsBounded(t *testing.T) {
	dir := t.TempDir()
	long := strings.Repeat("x", 10*maxError)
	var all, begun sync.WaitGroup
	begun.Add(8)
	for w := range 8 {
		all.Go(func() {
			for i := range 600 {
				if i == 599 { // one that is done early would be forgotten by right
					begun.Done()
					begun.Wait()
				}
				c := call("ADD", 7, time.Millisecond)
				c.ContainerID, c.Error = strconv.Itoa(w)+"-"+strconv.Itoa(i), long
				Record(dir, c)
			}
		})
	}
	all.Wait()
	last := map[string]bool{}
	for _, name := range []string{oldFile, logFile} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > maxLog+8*1024 {
			t.Errorf("%s has %d bytes", name, len(b))
		}
		for line := range strings.Lines(string(b)) {
			if !strings.HasPrefix(line, "time=") || !strings.HasSuffix(line, "x\"\n") || len(line) > maxError+200 {
				t.Fatalf("torn: %q", line)
			}
			for w := range 8 {
				if id := strconv.Itoa(w) + "-599"; strings.Contains(line, " container="+id+" ") {
					last[id] = true
				}
			}
		}
	}
	if len(last) != 8 {
		t.Errorf("of the last lines of 8 writers only %d are there", len(last))
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("%v, %v; want the log, an old one and the counters", entries, err)
	}
}

func TestCounters(t *testing.T) {
	dir := t.TempDir()
	if got, err := Read(dir); got != nil || err != nil {
		t.Fatalf("before the first call: %v, %v", got, err)
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 250 {
				Record(dir, call("ADD", 0, 3*time.Millisecond))
			}
		})
	}
	all.Wait()
	Record(dir, call("ADD", 11, 9*time.Second))
	Record(dir, call("DEL", 107, time.Minute))
	Record(dir, call("STATUS", 0, time.Microsecond))
	Record(dir, Call{Program: "stranger", Verb: "ADD"})
	Record(dir, Call{Program: "overlay-netavark", Verb: "DEL", Code: 7, Took: time.Minute}) // the last that it has
	Record(dir, Call{Program: "overlay-netavark", Verb: "STATUS", Code: 7, Took: time.Minute})
	got, err := Read(dir)
	if err != nil || len(got) != 5 {
		t.Fatalf("%+v, %v", got, err)
	}
	for i, want := range []struct {
		program, verb, result string
		n                     uint64
		bucket                int
		sum                   time.Duration
	}{
		{"d-overlay", "ADD", "ok", 2000, 3, 6 * time.Second}, {"d-overlay", "ADD", "again", 1, 15, 9 * time.Second},
		{"d-overlay", "DEL", "failed", 1, 16, time.Minute}, {"d-overlay", "STATUS", "ok", 1, 0, time.Microsecond},
		{"overlay-netavark", "DEL", "failed", 1, 16, time.Minute},
	} {
		c := got[i]
		if c.Program != want.program || c.Verb != want.verb || c.Result != want.result || c.Total() != want.n || c.Calls[want.bucket] != want.n || c.Sum != want.sum {
			t.Errorf("%+v, want %+v", c, want)
		}
	}
}

// TestHeldParts: a program that stopped while it counted delays no other one, which
// counts in another part; where all are held, nothing is counted.
func TestHeldParts(t *testing.T) {
	dir := t.TempDir()
	Record(dir, call("ADD", 0, time.Millisecond))
	f, err := os.OpenFile(filepath.Join(dir, countersFile), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for part := range int64(parts) {
		lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: part, Len: 1}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
			t.Fatal(err)
		}
		Record(dir, call("ADD", 0, time.Millisecond))
	}
	got, err := Read(dir)
	if err != nil || len(got) != 1 || got[0].Total() != parts || got[0].Calls[1] != parts || got[0].Sum != parts*time.Millisecond {
		t.Errorf("%+v, %v; want the first call and one in each part but the first", got, err)
	}
}

// TestForeignFiles: what stands in the way of the two files is left alone, and no
// call waits for it or fails.
func TestForeignFiles(t *testing.T) {
	for name, place := range map[string]func(path string) error{
		"directory": func(p string) error { return os.Mkdir(p, 0o700) },
		"fifo":      func(p string) error { return unix.Mkfifo(p, 0o600) },
		"device":    func(p string) error { return os.Symlink("/dev/full", p) },
		"other":     func(p string) error { return os.WriteFile(p, []byte("mine"), 0o600) },
		"link":      func(p string) error { return os.Symlink("/etc/passwd", p) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for _, file := range []string{logFile, countersFile} {
				if err := place(filepath.Join(dir, file)); err != nil {
					t.Fatal(err)
				}
			}
			Record(dir, call("ADD", 0, time.Millisecond))
			if _, err := Read(dir); err == nil {
				t.Error("counters were read")
			}
		})
	}
	Record("/nonexistent", call("ADD", 0, time.Millisecond))
}

// TestFullDisk: a file system without room for a page of the counters.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a file system")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	if err := os.WriteFile(filepath.Join(dir, "full"), make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	Record(dir, call("ADD", 0, time.Millisecond))
}
