// Package etcdtest runs real etcd clusters for tests. Every member is a process in
// a network namespace of its own, so that it can be cut off, in one direction
// too. The test's process lives in a namespace that has the bridge between them.
package etcdtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// child marks the process that runs in the new namespace.
const child = "OVERLAY_ETCDTEST_CHILD"

// Isolate runs m in a network namespace of its own and returns its exit code.
// TestMain calls it; it needs root.
func Isolate(m *testing.M) int {
	if os.Getenv(child) != "" {
		return m.Run()
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), child+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // the child dies with the thread that made it
	defer runtime.UnlockOSThread()
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return max(exit.ExitCode(), 1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "etcdtest:", err)
		return 1
	}
	return 0
}

// Cluster is an etcd cluster. It ends with the test.
type Cluster struct {
	Members []*Member
	CA      *CA      // nil: it speaks plain HTTP
	Client  Identity // of a client of it, when it has a CA

	t       testing.TB
	dir     string
	program string
	args    []string
	spawn   chan func() // run on one thread, so that members end with the process
}

// New starts a cluster of n members with further arguments to etcd, and waits
// until each serves.
func New(t testing.TB, n int, args ...string) *Cluster {
	t.Helper()
	return (&Cluster{t: t, program: "etcd", args: args}).start(n)
}

// NewSecure is New for a cluster that speaks TLS only, and demands a certificate of
// its clients. program is which etcd it runs.
func NewSecure(t testing.TB, n int, program string, args ...string) *Cluster {
	t.Helper()
	c := &Cluster{t: t, program: program, args: args, CA: NewCA(t)}
	c.Client = c.CA.Issue("client", "127.0.0.1", time.Now().Add(time.Hour))
	return c.start(n)
}

func (c *Cluster) start(n int) *Cluster {
	t := c.t
	t.Helper()
	c.spawn = make(chan func())
	var thread sync.WaitGroup
	thread.Go(func() {
		runtime.LockOSThread() // and never unlocked: the thread ends
		for f := range c.spawn {
			f()
		}
	})
	var err error
	// In memory where that is possible: what a disk does to etcd is not tested.
	if c.dir, err = os.MkdirTemp("/dev/shm", "etcdtest-"); err != nil {
		c.dir = t.TempDir()
	}
	t.Cleanup(func() {
		for _, m := range c.Members {
			m.Kill()
		}
		close(c.spawn)
		thread.Wait()
		os.RemoveAll(c.dir)
	})
	c.bridge()
	for i := range n {
		c.Members = append(c.Members, &Member{cluster: c, Name: fmt.Sprintf("m%d", i), IP: fmt.Sprintf("10.77.0.%d", 10+i)})
	}
	for _, m := range c.Members {
		m.Start("new")
	}
	c.Wait()
	return c
}

// bridge makes the network between the members, once in a process.
func (c *Cluster) bridge() {
	if exec.Command("ip", "link", "show", "etcd0").Run() == nil {
		return
	}
	for _, args := range []string{
		"link set lo up", "link add etcd0 type bridge", "addr add 10.77.0.1/24 dev etcd0", "link set etcd0 up",
	} {
		c.run("ip", strings.Fields(args)...)
	}
}

func (c *Cluster) run(name string, args ...string) string {
	c.t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		c.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Endpoints are the client URLs of all members.
func (c *Cluster) Endpoints() (urls []string) {
	for _, m := range c.Members {
		urls = append(urls, m.URL())
	}
	return urls
}

func (c *Cluster) scheme() string {
	if c.CA != nil {
		return "https://"
	}
	return "http://"
}

// Wait waits until every running member answers a linearizable read.
func (c *Cluster) Wait() {
	c.t.Helper()
	for _, m := range c.Members {
		if !m.Running() {
			continue
		}
		m.WaitReady()
	}
}

// Etcdctl runs etcdctl against a member.
func (m *Member) Etcdctl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	how := []string{"--endpoints", m.URL(), "--dial-timeout=2s", "--command-timeout=3s"}
	if ca := m.cluster.CA; ca != nil {
		how = append(how, "--cacert", ca.File, "--cert", m.cluster.Client.Cert, "--key", m.cluster.Client.Key)
	}
	cmd := exec.CommandContext(ctx, "etcdctl", append(how, args...)...)
	cmd.Env = append(os.Environ(), "ETCDCTL_API=3")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("etcdctl %s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out), err
}

// Leader is the member that leads; nil when none says so.
func (c *Cluster) Leader() *Member {
	for _, m := range c.Members {
		if !m.Running() || m.paused {
			continue
		}
		out, err := m.Etcdctl("endpoint", "status", "--write-out=fields")
		if err != nil {
			continue
		}
		var id, leader string
		for line := range strings.Lines(out) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), " : ")
			switch strings.Trim(key, `"`) {
			case "MemberID":
				id = value
			case "Leader":
				leader = value
			}
		}
		if id != "" && id == leader {
			return m
		}
	}
	return nil
}

// Member is one member of a cluster.
type Member struct {
	Name, IP string

	cluster      *Cluster
	server, peer Identity
	cmd          *exec.Cmd
	ended        chan struct{}
	paused       bool
}

// URL is where clients reach it.
func (m *Member) URL() string     { return m.cluster.scheme() + m.IP + ":2379" }
func (m *Member) peerURL() string { return m.cluster.scheme() + m.IP + ":2380" }
func (m *Member) data() string    { return filepath.Join(m.cluster.dir, m.Name) }

// Running reports whether the process is there.
func (m *Member) Running() bool {
	if m.cmd == nil {
		return false
	}
	select {
	case <-m.ended:
		return false
	default:
		return true
	}
}

// Start starts the process; state is "new" or "existing".
func (m *Member) Start(state string) {
	c := m.cluster
	c.t.Helper()
	var peers []string
	for _, o := range c.Members {
		peers = append(peers, o.Name+"="+o.peerURL())
	}
	args := append([]string{
		"--name", m.Name, "--data-dir", m.data(),
		"--listen-client-urls", m.URL(), "--advertise-client-urls", m.URL(),
		"--listen-peer-urls", m.peerURL(), "--initial-advertise-peer-urls", m.peerURL(),
		"--initial-cluster", strings.Join(peers, ","), "--initial-cluster-state", state,
		"--logger", "zap", "--log-level", "error", "--strict-reconfig-check=false",
	}, c.args...)
	if c.CA != nil {
		args = append(args, c.CA.arguments(m)...)
	}
	// It waits until its network is there.
	cmd := exec.Command("sh", append([]string{"-c", `read _ && exec "$0" "$@"`, c.program}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	log, err := os.OpenFile(m.data()+".log", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		c.t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	stdin, err := cmd.StdinPipe()
	if err != nil {
		c.t.Fatal(err)
	}
	started := make(chan error)
	c.spawn <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		c.t.Fatal(err)
	}
	m.cmd, m.ended, m.paused = cmd, make(chan struct{}), false
	go func(ended chan struct{}) {
		_ = cmd.Wait()
		log.Close()
		close(ended)
	}(m.ended)
	pid := fmt.Sprint(cmd.Process.Pid)
	_ = exec.Command("ip", "link", "del", m.Name).Run() // of an earlier life
	// The same address in every life, so that nobody's neighbour table is wrong.
	c.run("ip", "link", "add", m.Name, "type", "veth", "peer", "name", "eth0", "address", "02:77:00:00:00:"+m.IP[len(m.IP)-2:], "netns", pid)
	c.run("ip", "link", "set", m.Name, "master", "etcd0", "up")
	m.inside("ip", "link", "set", "lo", "up")
	m.inside("ip", "addr", "add", m.IP+"/24", "dev", "eth0")
	m.inside("ip", "link", "set", "eth0", "up")
	if _, err := io.WriteString(stdin, "\n"); err != nil {
		c.t.Fatal(err)
	}
}

func (m *Member) inside(name string, args ...string) {
	m.cluster.t.Helper()
	m.cluster.run("nsenter", append([]string{"-t", fmt.Sprint(m.cmd.Process.Pid), "-n", name}, args...)...)
}

// WaitReady waits until the member answers a linearizable read.
func (m *Member) WaitReady() {
	m.cluster.t.Helper()
	deadline := time.After(60 * time.Second)
	for {
		_, err := m.Etcdctl("get", "none")
		if err == nil {
			return
		}
		select {
		case <-deadline:
			log, _ := os.ReadFile(m.data() + ".log")
			m.cluster.t.Fatalf("etcd %s does not serve: %v\n%s", m.Name, err, log)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Kill ends the process at once.
func (m *Member) Kill() {
	if m.Running() {
		_ = m.cmd.Process.Kill()
		<-m.ended
	}
}

// Restart starts a member that was killed on the data it has.
func (m *Member) Restart() {
	m.cluster.t.Helper()
	m.Start("existing")
}

// Replace takes a member that was killed out of the cluster, with its data, and
// adds it as a new one.
func (m *Member) Replace() {
	c := m.cluster
	c.t.Helper()
	var other *Member
	for _, o := range c.Members {
		if o != m && o.Running() {
			other = o
		}
	}
	do := func(args ...string) (out string) {
		c.t.Helper()
		deadline := time.After(30 * time.Second)
		for {
			out, err := other.Etcdctl(args...)
			if err == nil {
				return out
			}
			select {
			case <-deadline:
				c.t.Fatal(err)
			case <-time.After(100 * time.Millisecond):
			}
		}
	}
	for line := range strings.Lines(do("member", "list")) {
		if fields := strings.Split(line, ", "); len(fields) > 2 && fields[2] == m.Name {
			do("member", "remove", fields[0])
		}
	}
	if err := os.RemoveAll(m.data()); err != nil {
		c.t.Fatal(err)
	}
	do("member", "add", m.Name, "--peer-urls", m.peerURL())
	m.Start("existing")
}

// Pause stops the process without closing its connections; Resume ends that.
func (m *Member) Pause() { m.paused = true; _ = m.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume lets a paused process go on.
func (m *Member) Resume() { m.paused = false; _ = m.cmd.Process.Signal(syscall.SIGCONT) }

// Cut drops what the member receives, or sends, or both. Heal ends that.
func (m *Member) Cut(receives, sends bool) {
	m.cluster.t.Helper()
	if receives {
		m.inside("iptables", "-A", "INPUT", "-i", "eth0", "-j", "DROP")
	}
	if sends {
		m.inside("iptables", "-A", "OUTPUT", "-o", "eth0", "-j", "DROP")
	}
}

// Heal ends Cut.
func (m *Member) Heal() {
	m.cluster.t.Helper()
	m.inside("iptables", "-F")
}

// Restore starts a member that was killed, the only one, on a snapshot.
func (m *Member) Restore(snapshot string) {
	c := m.cluster
	c.t.Helper()
	if err := os.RemoveAll(m.data()); err != nil {
		c.t.Fatal(err)
	}
	c.run("env", "ETCDCTL_API=3", "etcdctl", "snapshot", "restore", snapshot, "--name", m.Name, "--data-dir", m.data(),
		"--initial-cluster", m.Name+"="+m.peerURL(), "--initial-advertise-peer-urls", m.peerURL())
	m.Start("existing")
	m.WaitReady()
}
