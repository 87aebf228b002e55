package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// network has room for 65,536 agents: the /8 in /24s.
const network = `
vtep_subnet: 44.0.0.0/8
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: v4, subnet: 9.0.0.0/8, prefix: 24}
`

// coordinator is a running overlayd coordinator.
type coordinator struct {
	program, dir, addr string
	secure             bool
	tls                *tls.Config // of an operator; nil: not secure
	cmd                *exec.Cmd
	exited             chan error
}

// startCoordinator starts one on a free port of 127.0.0.1 and waits until it
// is ready.
func startCoordinator(ctx context.Context, program, dir string, secure bool) (*coordinator, error) {
	if err := os.WriteFile(filepath.Join(dir, "overlay.yaml"), []byte(network), 0o644); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	c := &coordinator{program: program, dir: dir, addr: l.Addr().String(), secure: secure}
	if err := l.Close(); err != nil {
		return nil, err
	}
	err = c.start(ctx)
	if err == nil && secure {
		if c.tls, err = c.login(ctx); err != nil {
			c.kill()
		}
	}
	return c, err
}

func (c *coordinator) start(ctx context.Context) error {
	log, err := os.OpenFile(filepath.Join(c.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"coordinator", "--config", filepath.Join(c.dir, "overlay.yaml"), "--listen", c.addr, "--state-dir", c.dir}
	if !c.secure {
		args = append(args, "--insecure")
	}
	c.cmd = exec.Command(c.program, args...)
	c.cmd.Stdout, c.cmd.Stderr = log, log
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.cmd.Start(); err != nil {
		return fmt.Errorf("start the coordinator: %w", err)
	}
	exited := make(chan error, 1)
	c.exited = exited
	go func(cmd *exec.Cmd) { exited <- cmd.Wait() }(c.cmd)
	return c.waitReady(ctx)
}

// login makes an operator, who may speak for every agent, as a proxy of all of them
// does.
func (c *coordinator) login(ctx context.Context) (*tls.Config, error) {
	ctl := filepath.Join(filepath.Dir(c.program), "overlayctl")
	run := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, ctl, args...)
		cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+c.dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("overlayctl %s: %w", args[0], err)
		}
		return strings.TrimSpace(string(out)), nil
	}
	token, err := run("token", "create", "--state-dir", c.dir, "--role", "operator")
	if err != nil {
		return nil, err
	}
	if _, err := run("login", "--coordinator", "https://"+c.addr, "--token", token); err != nil {
		return nil, err
	}
	identity := filepath.Join(c.dir, "overlay", "identity.pem")
	pair, err := tls.LoadX509KeyPair(identity, identity)
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(filepath.Join(c.dir, "overlay", "ca.pem"))
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(c.addr)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{pair}, RootCAs: roots, ServerName: host,
		ClientSessionCache: tls.NewLRUClientSessionCache(1),
	}, nil
}

func (c *coordinator) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	url, client := "http://"+c.addr+"/readyz", http.DefaultClient
	if c.secure { // nobody knows the CA yet, and nothing is told
		transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
		defer transport.CloseIdleConnections()
		url, client = "https://"+c.addr+"/readyz", &http.Client{Transport: transport}
	}
	for {
		resp, err := client.Get(url)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case err := <-c.exited:
			c.exited <- err
			b, _ := os.ReadFile(filepath.Join(c.dir, "log"))
			return fmt.Errorf("the coordinator ended (%v) before it was ready:\n%s", err, b)
		case <-ctx.Done():
			return fmt.Errorf("the coordinator is not ready: %w", context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// kill ends it without warning and waits until it is gone.
func (c *coordinator) kill() {
	c.cmd.Process.Kill()
	<-c.exited
	c.exited <- nil // for whoever kills it again
}

// status returns a line of /proc/<pid>/status in MiB.
func (c *coordinator) status(key string) (float64, error) {
	kb, err := c.proc("status", key+":")
	return kb / 1024, err
}

// written is how many bytes it has caused to be written to disk.
func (c *coordinator) written() (float64, error) { return c.proc("io", "write_bytes:") }

// proc returns the number behind a key in one of its files in /proc.
func (c *coordinator) proc(file, key string) (float64, error) {
	path := fmt.Sprintf("/proc/%d/%s", c.cmd.Process.Pid, file)
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			return strconv.ParseFloat(strings.Fields(rest)[0], 64)
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, key)
}

// cpu returns its user and system time in seconds.
func (c *coordinator) cpu() (float64, error) { return cpuOf(c.cmd.Process.Pid) }

func cpuOf(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, ok := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if !ok || len(f) < 13 {
		return 0, fmt.Errorf("process %d: cannot read its times", pid)
	}
	user, err1 := strconv.ParseFloat(f[11], 64)
	system, err2 := strconv.ParseFloat(f[12], 64)
	const ticksPerSecond = 100 // USER_HZ, fixed by the kernel's ABI
	return (user + system) / ticksPerSecond, errors.Join(err1, err2)
}

// stored is what a write to its file would change.
type stored struct {
	size    int64
	changed time.Time
	written float64
}

func (c *coordinator) stored() (s stored, err error) {
	info, err := os.Stat(filepath.Join(c.dir, "coordinator.db"))
	if err != nil {
		return s, err
	}
	s.size, s.changed = info.Size(), info.ModTime()
	s.written, err = c.written()
	return s, err
}
