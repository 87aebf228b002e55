// Package calls keeps what the CNI programs have done on a host where people and
// the agent find it, in the run directory: a log of bounded size, and counters of
// results and durations. Nothing of it may fail or delay a call, so every error is
// left out: a program that cannot write has still done its work.
package calls

import (
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	logFile = "cni.log"
	oldFile = "cni.log.1"
	// maxLog is the size at which the log is set aside. There is one old one.
	maxLog = 1 << 20
	// maxError is how much of an error the log repeats.
	maxError = 500
)

// Files are what is kept in the run directory, for who takes it all away.
func Files() []string { return []string{logFile, oldFile, countersFile} }

// Call is one call of a CNI program that has ended.
type Call struct {
	Program, Verb                string
	Network, ContainerID, IfName string // as far as the call says
	Began                        time.Time
	Took                         time.Duration
	Code                         uint   // of CNI; 0: it was successful
	Error                        string // what the runtime was answered
}

// create is O_CREAT for an ADD: a verb that only looks, or takes away, makes no file
// where there was never anything.
func (c Call) create() int {
	if c.Verb == "ADD" {
		return unix.O_CREAT
	}
	return 0
}

// line is the call as the log has it. It never holds anything of the configuration
// but names, nor of the environment.
func (c Call) line() []byte {
	b := make([]byte, 0, 256)
	b = append(b, "time="...)
	b = c.Began.UTC().AppendFormat(b, "2006-01-02T15:04:05.000Z")
	b = append(b, " program="+c.Program+" verb="+c.Verb+" result="+resultNames[c.result()]+" took="...)
	b = strconv.AppendFloat(b, float64(c.Took)/float64(time.Millisecond), 'f', 2, 64)
	b = append(b, "ms"...)
	for _, f := range [...]struct{ key, value string }{{"network", c.Network}, {"container", c.ContainerID}, {"ifname", c.IfName}} {
		if f.value != "" {
			b = append(b, " "+f.key+"="+f.value...)
		}
	}
	if c.Code != 0 {
		b = append(b, " code="...)
		b = strconv.AppendUint(b, uint64(c.Code), 10)
		b = append(b, " err="...)
		b = strconv.AppendQuote(b, c.Error[:min(len(c.Error), maxError)])
	}
	return append(b, '\n')
}

// openLog opens the log, and sets one aside that is full. It returns -1 where there
// can be none, or is none and create does not ask for it.
func openLog(dir string, create int) int {
	path := filepath.Join(dir, logFile)
	for range 3 {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_APPEND|create|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
		if err != nil {
			return -1
		}
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			unix.Close(fd)
			return -1
		}
		if st.Size < maxLog {
			return fd
		}
		// Of several who see that it is full, one renames it: the others would
		// rename the one that comes after it.
		var now unix.Stat_t
		if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil && unix.Lstat(path, &now) == nil && now.Ino == st.Ino {
			_ = unix.Rename(path, filepath.Join(dir, oldFile))
		}
		unix.Close(fd)
	}
	return -1
}
