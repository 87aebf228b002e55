package attach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// lockFile is in the run directory. It has no content: attachments lock one byte
// each, at the offset their key gives.
const lockFile = conf.AttachmentsFile

// lockTimeout is how long one program waits for another that works on the same
// attachment.
const lockTimeout = 8 * time.Second

// errLocked: another program works on the same attachment.
var errLocked = errors.New("another ADD or DEL of the same attachment is still running")

// lock keeps two programs from working on one attachment at the same time: a
// DEL that overtakes a slow ADD, or a second ADD, would leave an interface whose
// address is free. The kernel lets go when the program ends, however it ends.
// The lock costs two system calls and different attachments never wait.
//
// A directory that is not there, or that cannot be written, locks nothing:
// then no address can be given out either.
func lock(ctx context.Context, dir string, key conf.Key) (unlock func(), err error) {
	// Not an os.File, which the garbage collector would close while ADD, which
	// never unlocks, still counts on it.
	fd, err := unix.Open(filepath.Join(dir, lockFile), unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	switch err {
	case nil:
	case unix.ENOENT, unix.ENOTDIR, unix.EACCES, unix.EROFS, unix.ENOSPC:
		return func() {}, nil
	default:
		return nil, fmt.Errorf("lock attachment: open %s: %w", filepath.Join(dir, lockFile), err)
	}
	one := &unix.Flock_t{
		Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Len: 1,
		Start: int64(binary.BigEndian.Uint64(key[:8]) >> 2), // stays positive, one byte after it too
	}
	unlock = func() { unix.Close(fd) }
	if unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, one) == nil {
		return unlock, nil
	}
	held := make(chan error, 1)
	go func() { held <- unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLKW, one) }()
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	select {
	case err := <-held:
		if err != nil {
			unlock()
			return nil, fmt.Errorf("lock attachment: %w", err)
		}
		return unlock, nil
	case <-ctx.Done():
		// The goroutine ends with the program, which is about to end.
		return nil, errLocked
	}
}
