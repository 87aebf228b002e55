package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Proc is a long-running program in a namespace of the lab.
type Proc struct {
	Name string
	Log  string // file with stdout and stderr; a restart under the same name appends

	cmd    *exec.Cmd
	exited chan struct{} // closed when it has ended
}

// Start runs a program inside the namespace until it is killed, stopped, or the
// lab is closed.
func (l *Lab) Start(n *Netns, name string, argv ...string) (*Proc, error) {
	p := &Proc{
		Name:   name,
		Log:    filepath.Join(l.Dir, name+".log"),
		cmd:    n.Command(context.Background(), argv...),
		exited: make(chan struct{}),
	}
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.cmd.Wait()
		close(p.exited)
	}()
	l.mu.Lock()
	l.procs = append(l.procs, p)
	l.mu.Unlock()
	return p, nil
}

// Pid is the process id of the program.
func (p *Proc) Pid() int { return p.cmd.Process.Pid }

// Fate says whether the program runs, or how it ended.
func (p *Proc) Fate() string {
	select {
	case <-p.exited:
		return p.cmd.ProcessState.String()
	default:
		return "running"
	}
}

// Exited is closed when the program has ended.
func (p *Proc) Exited() <-chan struct{} { return p.exited }

// Kill ends the program with SIGKILL and returns when it is gone.
func (p *Proc) Kill() {
	p.cmd.Process.Kill()
	<-p.exited
}

// Stop asks the program to end with SIGTERM. It fails when that takes longer
// than ten seconds or the exit status is not 0.
func (p *Proc) Stop() error { return p.StopBy(syscall.SIGTERM) }

// StopBy is Stop by another signal.
func (p *Proc) StopBy(signal syscall.Signal) error {
	p.cmd.Process.Signal(signal)
	select {
	case <-p.exited:
	case <-time.After(10 * time.Second):
		p.Kill()
		return fmt.Errorf("%s did not end within 10 s of %v", p.Name, signal)
	}
	if !p.cmd.ProcessState.Success() {
		return fmt.Errorf("%s ended with %s after %v", p.Name, p.cmd.ProcessState, signal)
	}
	return nil
}

// LogContains reports whether the program has logged all of these.
func (p *Proc) LogContains(text ...string) error {
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return err
	}
	for _, t := range text {
		if !strings.Contains(string(b), t) {
			return fmt.Errorf("%s has not logged %q", p.Name, t)
		}
	}
	return nil
}
