package attach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/ipam"
)

// lockFile stands beside the address stores. It has no content: attachments
// lock one byte each, at the offset their key gives.
const lockFile = "attachments.lock"

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
func lock(ctx context.Context, dir string, key ipam.Key) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.ENOSPC) {
		return func() {}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("lock attachment: %w", err)
	}
	one := &unix.Flock_t{
		Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Len: 1,
		Start: int64(binary.BigEndian.Uint64(key[:8]) >> 2), // stays positive, one byte after it too
	}
	unlock = func() { f.Close() }
	if unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, one) == nil {
		return unlock, nil
	}
	held := make(chan error, 1)
	go func() { held <- unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, one) }()
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	select {
	case err := <-held:
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock attachment: %w", err)
		}
		return unlock, nil
	case <-ctx.Done():
		// The goroutine ends with the program, which is about to end.
		return nil, errLocked
	}
}
