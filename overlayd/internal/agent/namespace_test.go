package agent

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Two agents in one network namespace would delete each other's devices. The
// second names the first, wherever its directories are, and starts when that is
// gone.
func TestOneAgentPerNamespace(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	first := newHost(c)
	first.start()
	first.ready()

	second := newHost(c)
	second.opts.IP = addr("172.17.0.5")
	names := fmt.Sprintf("another agent (process %d, run directory %s) runs in this network namespace", os.Getpid(), first.opts.RunDir)
	mustNotStart(t, second.opts, names)
	same := second.opts
	same.RunDir = first.opts.RunDir
	mustNotStart(t, same, fmt.Sprintf("another agent (process %d) uses %s", os.Getpid(), first.opts.RunDir))
	same.RunDir, same.StateDir = second.opts.RunDir, first.opts.StateDir
	mustNotStart(t, same, fmt.Sprintf("another agent (process %d) uses %s", os.Getpid(), first.opts.StateDir))
	if err := hasAddr("d-dcos", "9.0.0.129/25"); err != nil {
		t.Error(err)
	}

	first.stop()
	second.start()
	second.ready()
}

// An agent in another namespace is none of ours, and neither is a program that
// has the name for another reason: that is named, too.
func TestNamespaceHeldByAnother(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	c.remote.do(t, func() { // as if an agent ran where the coordinator is
		lock, err := lockNamespace(t.Context(), "/run/elsewhere")
		must(t, err)
		t.Cleanup(lock.release)
	})
	h.start()
	h.ready()
	h.stop()

	silent, err := lockNamespace(t.Context(), "")
	must(t, err)
	mustNotStart(t, h.opts, fmt.Sprintf("another agent (process %d, which does not say its run directory)", os.Getpid()))
	silent.release()
}

// A program that the agent was just starting when it was killed holds what the
// agent held, for the moment until it runs.
func TestNamespaceLeftToChild(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	dir := t.TempDir()
	lock, err := lockNamespace(t.Context(), dir)
	must(t, err)
	file, err := lock.l.File() // survives the exec, as the socket itself does not
	must(t, err)
	child := exec.Command("sh", "-c", "exec >/dev/null; read line")
	child.ExtraFiles = []*os.File{file}
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := child.StdinPipe()
	must(t, err)
	must(t, child.Start())
	must(t, file.Close())
	lock.release()

	timer := time.AfterFunc(300*time.Millisecond, func() { in.Close() })
	defer timer.Stop()
	again, err := lockNamespace(t.Context(), dir)
	if err != nil {
		t.Errorf("after the agent was killed: %v", err)
	} else {
		again.release()
	}
	child.Wait()
}

// The run directory that another process says is not believed to be short or
// plain text.
func TestHolderSaysTooMuch(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	lock, err := lockNamespace(t.Context(), filepath.Join("/", strings.Repeat("x\xff", 50_000)))
	must(t, err)
	ctx := t.Context()
	done := make(chan error, 1)
	go func() { done <- lock.answer(ctx) }()
	if _, err := lockNamespace(ctx, "/run/second"); err == nil || len(err.Error()) > 10_000 {
		t.Errorf("refused with %d bytes", len(fmt.Sprint(err)))
	}
	lock.release()
	must(t, <-done)
}
