package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// onlyAgent is an abstract socket: its name belongs to the network namespace, as
// the VTEP does, so it is held wherever the directories of an agent lie, and is
// free again when the process ends.
const onlyAgent = "@overlayd-agent"

// namespaceLock keeps other agents out of a network namespace: two would take
// each other's devices for leftovers.
type namespaceLock struct {
	l      *net.UnixListener
	runDir string
}

// lockNamespace fails if another agent has this network namespace. It waits a
// moment for one that is ending: a program that it has just started holds what
// it held, until that runs.
func lockNamespace(ctx context.Context, runDir string) (*namespaceLock, error) {
	patience := time.After(lockPatience)
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	for {
		l, err := new(net.ListenConfig).Listen(ctx, "unix", onlyAgent)
		if err == nil {
			return &namespaceLock{l: l.(*net.UnixListener), runDir: runDir}, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("lock the network namespace: %w", err)
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-patience:
			return nil, fmt.Errorf("another agent (%s) runs in this network namespace already; the two would delete each other's devices. Stop one of them",
				holder(ctx))
		}
	}
}

// holder says who has the namespace.
func holder(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unix", onlyAgent)
	if err != nil {
		return "it does not answer"
	}
	defer c.Close()
	who := "process unknown"
	if pid := peerPID(c.(*net.UnixConn)); pid > 0 {
		who = fmt.Sprintf("process %d", pid)
	}
	deadline, _ := ctx.Deadline()
	if c.SetReadDeadline(deadline) != nil {
		return who
	}
	runDir, err := io.ReadAll(io.LimitReader(c, 4096))
	if err != nil || len(runDir) == 0 {
		return who + ", which does not say its run directory"
	}
	return fmt.Sprintf("%s, run directory %s", who, strings.ToValidUTF8(string(runDir), "?"))
}

// peerPID is the process that listens, 0 if it lives in a PID namespace that
// cannot be seen from here.
func peerPID(c *net.UnixConn) (pid int32) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = cred.Pid
		}
	})
	return pid
}

// answer says the run directory to whoever asks, until ctx is done.
func (n *namespaceLock) answer(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { n.l.Close() })
	defer stop()
	for {
		c, err := n.l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) || !pause(ctx, time.Second) {
				return nil
			}
			continue // too many open files: the name is held all the same
		}
		c.SetWriteDeadline(time.Now().Add(time.Second))
		io.WriteString(c, n.runDir)
		c.Close()
	}
}

// release gives the namespace free.
func (n *namespaceLock) release() { n.l.Close() }

// pause returns after d, or false when ctx is done before.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
