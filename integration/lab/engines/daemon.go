package engines

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Daemon is a program that keeps running on a host.
type Daemon struct {
	Name string
	Log  string // file with both its streams, of all its runs

	cmd  *exec.Cmd // nsenter, whose child is the program
	pid  int
	done chan struct{} // closed when it has ended
	err  error         // why, valid after done
}

// Start starts a program inside the host. It is killed when the host crashes.
// Its output goes to a log file of that name on the host's disk.
func (h *Host) Start(name string, args ...string) (*Daemon, error) {
	logName := filepath.Join(h.Dir, "log", name+".log")
	log, err := os.OpenFile(logName, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	fmt.Fprintf(log, "--- %s %s: %s\n", time.Now().Format(time.TimeOnly), h.Name, strings.Join(args, " "))

	d := &Daemon{Name: name, Log: logName, done: make(chan struct{})}
	d.cmd = h.Command(context.Background(), args...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s on %s: %w", name, h.Name, err)
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.done)
	}()
	h.mu.Lock()
	h.daemons = append(h.daemons, d)
	h.mu.Unlock()

	err = eventually(5*time.Second, func() error {
		d.pid, err = child(d.cmd.Process.Pid)
		if err != nil && d.Ended() {
			return nil
		}
		return err
	})
	if err == nil && d.pid == 0 {
		err = d.err
	}
	if err != nil {
		return nil, fmt.Errorf("start %s on %s: %w: %s", name, h.Name, err, d.Tail(20))
	}
	return d, nil
}

// child is the one child of a process.
func child(pid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// Ended says whether the program has ended.
func (d *Daemon) Ended() bool {
	select {
	case <-d.done:
		return true
	default:
		return false
	}
}

// Kill ends the program, and only it, the hard way. What it started lives on.
func (d *Daemon) Kill() error { return d.end(syscall.SIGKILL, 10*time.Second) }

// Stop asks the program to end and waits for that. One that does not obey
// within 20 s is killed, which is an error.
func (d *Daemon) Stop() error {
	err := d.end(syscall.SIGTERM, 20*time.Second)
	if err != nil {
		return errors.Join(err, d.Kill())
	}
	return nil
}

func (d *Daemon) end(sig syscall.Signal, limit time.Duration) error {
	if d.Ended() {
		return nil
	}
	if err := syscall.Kill(d.pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("%s %s: %w", sig, d.Name, err)
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-d.done:
		return nil
	case <-timer.C:
		return fmt.Errorf("%s: still running %s after %q", d.Name, limit, sig)
	}
}

// Tail is the end of the log, at most n lines.
func (d *Daemon) Tail(n int) string { return tail(d.Log, n) }

func tail(file string, n int) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	for i, l := range lines {
		lines[i] = l[:min(len(l), 400)]
	}
	return strings.Join(lines, "\n")
}

// Logs is the end of every log file of the host, for the report of a failure.
func (h *Host) Logs(lines int) string {
	files, _ := filepath.Glob(filepath.Join(h.Dir, "log", "*.log"))
	var b strings.Builder
	for _, f := range files {
		fmt.Fprintf(&b, "--- end of %s of %s\n%s\n", filepath.Base(f), h.Name, tail(f, lines))
	}
	return b.String()
}
