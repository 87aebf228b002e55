package attach

import (
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// turn is for those who have nftables forget something. The kernel frees it later,
// and who ends a conversation with nftables before has to wait for that, and keeps
// all others from nftables and, worse, from removing interfaces. Of fifty DELs at
// once each would stop the others so. They end their conversations when none of
// them is about to have freed what it removed; one alone notices nothing of it. See
// findings/nft-close-after-delete.sh.
//
// It is a lock on a byte of the lock file that no attachment has. Another one has who
// removes links, for himself and for those who wait for him; see removeLink. The zero
// value, and one whose file cannot be opened, let everybody go at once.
type turn struct{ fd int }

// The bytes of a turn come after those of all attachments.
const (
	forgetting = 1<<62 + iota
	removing
)

// turnLimit is how long one waits for the others. Where containers go all the time
// nobody is ever alone, and each would wait that long.
const turnLimit = 150 * time.Millisecond

func openTurn(dir string) turn {
	fd, err := unix.Open(filepath.Join(dir, lockFile), unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return turn{}
	}
	return turn{fd}
}

func (t turn) close() {
	if t.fd > 0 {
		unix.Close(t.fd)
	}
}

// begin is called before something is forgotten.
func (t turn) begin() { t.take(unix.F_RDLCK) }

// end is called when the kernel has had the time to free it, and returns when the
// others are that far.
func (t turn) end() {
	t.try(forgetting, unix.F_UNLCK)
	t.take(unix.F_WRLCK)
	t.try(forgetting, unix.F_UNLCK)
}

// take asks until it gets the lock of those who forget or the time is over.
func (t turn) take(kind int16) {
	until := time.Now().Add(turnLimit)
	for pause := firstPause; !t.try(forgetting, kind) && time.Now().Before(until); pause = min(2*pause, longestPause) {
		_ = unix.Nanosleep(&unix.Timespec{Nsec: int64(pause)}, nil)
	}
}

// try locks a byte, or unlocks it, and reports whether there is nothing to wait for.
func (t turn) try(which int64, kind int16) bool {
	if t.fd <= 0 {
		return true
	}
	err := unix.FcntlFlock(uintptr(t.fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Whence: unix.SEEK_SET, Start: which, Len: 1})
	return err != unix.EAGAIN && err != unix.EACCES
}
