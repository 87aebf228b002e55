package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// cluster is what the faults happen to: three hosts, and a container on each of
// two of them.
type cluster struct {
	*lab.Seed
	a, b *lab.Container
}

// unbroken runs f while the two containers exchange fifty packets a second, none
// of which may be lost.
func (c cluster) unbroken(t *testing.T, f func()) {
	t.Helper()
	var out bytes.Buffer
	ping := c.a.Netns.Command(t.Context(), "ping", "-n", "-q", "-i", "0.02", "-W", "2", c.b.Addr().String())
	ping.Stdout, ping.Stderr = &out, &out
	must(t, ping.Start())
	f()
	must(t, ping.Process.Signal(syscall.SIGINT))
	_ = ping.Wait() // the counts tell
	sent, received, err := lab.PingCounts(out.String())
	must(t, err)
	// The last one may be on its way when ping is told to end.
	if sent < 2 || received < sent-1 {
		t.Errorf("%d of %d packets between the containers were answered", received, sent)
	}
}

// attach attaches a container that the caller removes.
func (c cluster) attach(t *testing.T, agent int, name, half string) *lab.Container {
	t.Helper()
	extra, err := c.Agents[agent].Attach(t.Context(), name, "dcos", half)
	must(t, err)
	return extra
}

// epoch is that of the lease that a host has published.
func epoch(t *testing.T, h *lab.Host) (n uint64) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(h.RunDir, "state.json"))
	must(t, err)
	var s struct{ Lease struct{ Epoch uint64 } }
	must(t, json.Unmarshal(b, &s))
	return s.Lease.Epoch
}

// joins starts an agent on a host of its own, waits until those given forward to
// it, and takes it away again.
func (c cluster) joins(t *testing.T, name string, n byte, meanwhile func(*lab.Host), knows ...*lab.Host) {
	t.Helper()
	ctx := t.Context()
	h, err := c.Host(ctx, name, n)
	must(t, err)
	must(t, c.StartAgent(h))
	t.Cleanup(h.Proc.Kill)
	must(t, h.WaitReady(ctx))
	if meanwhile != nil {
		meanwhile(h)
	}
	for _, other := range knows {
		wait(t, other.Name+" to forward to "+name, 20*time.Second, func() error {
			out, err := other.Run(ctx, "bridge", "fdb", "show", "dev", "vtep1024")
			if err != nil || !strings.Contains(out, "dst "+h.Underlay().String()+" ") {
				return fmt.Errorf("%v: %s", err, out)
			}
			return nil
		})
	}
	must(t, h.Proc.Stop())
	_, err = c.Overlayctl(ctx, "agents", "remove", h.Underlay().String())
	must(t, err)
}

// drops has a host lose packets from or to another until the function that it
// returns is called.
func drops(t *testing.T, h *lab.Host, rules ...string) (heal func()) {
	t.Helper()
	script := "add table inet fault\n"
	for hook, name := range map[string]string{"input": "in", "output": "out"} {
		script += fmt.Sprintf("add chain inet fault %s { type filter hook %s priority -300; }\n", name, hook)
	}
	for _, r := range rules {
		script += "add rule inet fault " + r + "\n"
	}
	nft := func(ctx context.Context, script string) error {
		cmd := h.Netns.Command(ctx, "nft", "-f", "-")
		cmd.Stdin = strings.NewReader(script)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	must(t, nft(t.Context(), script))
	healed := false
	heal = func() {
		t.Helper()
		if !healed {
			healed = true
			must(t, nft(context.Background(), "delete table inet fault\n"))
		}
	}
	t.Cleanup(heal)
	return heal
}

// whole says that both containers reach each other, and that either host attaches.
func (c cluster) whole(t *testing.T) {
	t.Helper()
	waitPing(t, c.a.Netns, c.b.Addr(), healTime)
	waitPing(t, c.b.Netns, c.a.Addr(), healTime)
	for i, h := range c.Agents {
		wait(t, h.Name+" to be ready", 20*time.Second, func() error { _, err := h.Get(t.Context(), "/readyz"); return err })
		extra := c.attach(t, i, fmt.Sprintf("x%d", i), lab.Mesos)
		waitPing(t, extra.Netns, c.b.Addr(), healTime)
		must(t, extra.Remove(t.Context()))
	}
}

// TestFault: what happens to clusters, by name. Each leaves the cluster whole; the
// lease of no host changes, whatever happens.
func TestFault(t *testing.T) {
	t.Parallel()
	c := cluster{Seed: upSeed(t, seedConfig(t))}
	c.a, c.b = place(t, c.Seed, 0, "a", "dcos", lab.Docker), place(t, c.Seed, 1, "b", "dcos", lab.Docker)
	waitPing(t, c.a.Netns, c.b.Addr(), healTime)
	before := [2]uint64{epoch(t, c.Agents[0]), epoch(t, c.Agents[1])}
	for _, f := range []struct {
		name string
		run  func(*testing.T, cluster)
	}{
		{"coordinator-down", coordinatorDown},
		{"coordinator-restart-storm", coordinatorRestartStorm},
		{"two-coordinators-same-file", twoCoordinatorsSameFile},
		{"two-coordinators-two-files", twoCoordinatorsTwoFiles},
		{"agent-partition", agentPartition},
		{"asymmetric-partition", asymmetricPartition},
		{"packet-loss", packetLoss},
		{"mtu-1400", smallerMTU},
		{"duplicate-node-id", duplicateNodeID},
		{"underlay-nic-down", underlayDown},
		{"default-route-change", defaultRouteChange},
		{"clock-jump", clockJump},
		{"suspend", suspend},
	} {
		t.Run(f.name, func(t *testing.T) {
			f.run(t, c)
			c.whole(t)
			now := [2]uint64{epoch(t, c.Agents[0]), epoch(t, c.Agents[1])}
			if f.name == "mtu-1400" { // leases tell others the MTU of a host
				before = now
			}
			if now != before {
				t.Errorf("epochs of the leases were %v and are %v", before, now)
			}
		})
	}
}

// Hosts start again and attach without the coordinator.
func coordinatorDown(t *testing.T, c cluster) {
	ctx := t.Context()
	c.Coordinator.Kill()
	c.unbroken(t, func() {
		for i := range 3 {
			h := c.Agents[0]
			h.Proc.Kill()
			must(t, c.StartAgent(h))
			must(t, h.WaitReady(ctx))
			extra := c.attach(t, 0, fmt.Sprintf("down%d", i), lab.Docker)
			waitPing(t, extra.Netns, c.b.Addr(), healTime)
			must(t, extra.Remove(ctx))
		}
	})
	must(t, c.Coordinator.Restart(ctx))
}

// Agents follow a coordinator that is killed again and again.
func coordinatorRestartStorm(t *testing.T, c cluster) {
	c.unbroken(t, func() {
		for range 6 {
			c.Coordinator.Kill()
			must(t, c.Coordinator.Restart(t.Context()))
		}
	})
	c.joins(t, "storm", 30, nil, c.Agents...)
}

func (c cluster) anotherCoordinator(ctx context.Context, n *lab.Node, store, stateDir string, args ...string) *exec.Cmd {
	return n.Command(ctx, append([]string{filepath.Join(c.Bin, "overlayd"), "coordinator", "--config", filepath.Join(c.Dir, "coordinator", "overlay.yaml"),
		"--listen", "127.0.0.1:7440", "--store", store, "--state-dir", stateDir}, args...)...)
}

// The second does not start, and says who has the file.
func twoCoordinatorsSameFile(t *testing.T, c cluster) {
	store := "bbolt:" + filepath.Join(c.Dir, "coordinator", "coordinator.db")
	for _, dir := range []string{filepath.Join(c.Dir, "coordinator"), t.TempDir()} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		out, err := c.anotherCoordinator(ctx, c.Master.Node, store, dir).CombinedOutput()
		cancel()
		if err == nil || !strings.Contains(string(out), fmt.Sprint(c.Coordinator.Proc.Pid())) {
			t.Errorf("with state directory %s: %v, and does not name process %d:\n%s", dir, err, c.Coordinator.Proc.Pid(), out)
		}
	}
}

// An agent stays with its cluster when it is sent to another one's coordinator.
func twoCoordinatorsTwoFiles(t *testing.T, c cluster) {
	ctx, dir := t.Context(), t.TempDir()
	other := c.anotherCoordinator(ctx, c.Master.Node, "bbolt:"+filepath.Join(dir, "db"), dir, "--advertise", c.Master.Underlay().String())
	for i, arg := range other.Args {
		if arg == "127.0.0.1:7440" {
			other.Args[i] = "0.0.0.0:7440"
		}
	}
	var log bytes.Buffer
	other.Stdout, other.Stderr = &log, &log
	must(t, other.Start())
	stopped := false
	stop := func() {
		if !stopped {
			stopped = true
			_ = other.Process.Kill()
			_ = other.Wait()
		}
	}
	defer stop()
	h := c.Agents[0]
	// An agent that asks before says of all that follows that nobody can be reached.
	wait(t, "the other coordinator to listen", 20*time.Second, func() error {
		_, err := h.Run(ctx, "bash", "-c", fmt.Sprintf("</dev/tcp/%s/7440", c.Master.Underlay()))
		return err
	})
	c.unbroken(t, func() {
		h.Proc.Kill()
		must(t, h.StartAgent("https://"+netip.AddrPortFrom(c.Master.Underlay(), 7440).String()))
		wait(t, "the agent to say why it stays", 20*time.Second, func() error {
			b, err := h.Get(ctx, "/overlay-agent/overlay")
			if err != nil {
				return err
			}
			var s struct{ Lease struct{ Error, Lost string } }
			must(t, json.Unmarshal(b, &s))
			if s.Lease.Lost != "" {
				t.Errorf("the lease is lost: %s", s.Lease.Lost)
			}
			if s.Lease.Error == "" || strings.Contains(s.Lease.Error, "connection refused") {
				return fmt.Errorf("it says %q", s.Lease.Error)
			}
			return nil
		})
	})
	stop()
	h.Proc.Kill()
	must(t, c.StartAgent(h))
	must(t, h.WaitReady(ctx))
}

// notFollowing waits until a host says that it does not learn of peers, or that the
// coordinator does not answer, which is the reason.
func notFollowing(t *testing.T, h *lab.Host) {
	t.Helper()
	wait(t, h.Name+" to say that it does not follow its peers", time.Minute, func() error {
		b, err := h.Get(t.Context(), "/overlay-agent/overlay")
		if err != nil || !strings.Contains(string(b), "following the peers") && !strings.Contains(string(b), `"error":"POST /v1/register: `) {
			return fmt.Errorf("%v: %s", err, b)
		}
		return nil
	})
}

// A host that cannot reach the coordinator forwards and attaches, and learns what
// it has missed.
func agentPartition(t *testing.T, c cluster) {
	h, master := c.Agents[0], c.Master.Underlay()
	heal := drops(t, h, fmt.Sprintf("in ip saddr %s tcp sport %d drop", master, lab.CoordinatorPort), fmt.Sprintf("out ip daddr %s tcp dport %d drop", master, lab.CoordinatorPort))
	c.unbroken(t, func() {
		extra := c.attach(t, 0, "apart", lab.Mesos)
		waitPing(t, extra.Netns, c.b.Addr(), healTime)
		must(t, extra.Remove(t.Context()))
		c.joins(t, "missed", 31, func(*lab.Host) { notFollowing(t, h); heal() }, c.Agents...)
	})
}

// The same where packets get lost in one direction only. What the coordinator says
// of peers still arrives where only the answers get lost.
func asymmetricPartition(t *testing.T, c cluster) {
	h, master := c.Agents[0], c.Master.Underlay()
	heal := drops(t, h, fmt.Sprintf("in ip saddr %s tcp sport %d drop", master, lab.CoordinatorPort))
	c.unbroken(t, func() { c.joins(t, "deaf", 32, func(*lab.Host) { heal() }, c.Agents...) })
	heal = drops(t, h, fmt.Sprintf("out ip daddr %s tcp dport %d drop", master, lab.CoordinatorPort))
	c.unbroken(t, func() { c.joins(t, "mute", 33, nil, c.Agents...) })
	heal()
}

// An agent joins, and others learn of it, although three of ten packets to and
// from the coordinator get lost.
func packetLoss(t *testing.T, c cluster) {
	h, master := c.Agents[0], c.Master.Underlay()
	heal := drops(t, h, fmt.Sprintf("in ip saddr %s numgen random mod 10 < 3 drop", master), fmt.Sprintf("out ip daddr %s numgen random mod 10 < 3 drop", master))
	h.Proc.Kill()
	must(t, c.StartAgent(h))
	wait(t, "the agent to be ready", time.Minute, func() error { _, err := h.Get(t.Context(), "/readyz"); return err })
	c.joins(t, "lossy", 34, nil, c.Agents...)
	heal()
}

// A smaller MTU of one host's underlay is followed: large transfers pass, both
// ways, to containers that were there before.
func smallerMTU(t *testing.T, c cluster) {
	ctx, h := t.Context(), c.Agents[0]
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	both := func() {
		t.Helper()
		for from, to := range map[*lab.Container]*lab.Container{c.a: c.b, c.b: c.a} {
			limited, cancel := context.WithTimeout(ctx, 30*time.Second)
			_, err := from.Netns.Transfer(limited, to.Addr(), big)
			cancel()
			must(t, err)
		}
	}
	both()
	must(t, h.Configure(ctx, "link set eth0 mtu 1400"))
	wait(t, "the MTU to be followed", healTime, func() error {
		out, err := h.Run(ctx, "ip", "-o", "link", "show", "vtep1024")
		if err != nil || !strings.Contains(out, "mtu 1350 ") {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
	both()
	must(t, h.Configure(ctx, "link set eth0 mtu 1500"))
	wait(t, "the MTU to be followed", healTime, func() error {
		out, err := h.Run(ctx, "ip", "-o", "link", "show", "vtep1024")
		if err != nil || !strings.Contains(out, "mtu 1450 ") {
			return fmt.Errorf("%v: %s", err, out)
		}
		return nil
	})
	both()
}

// A machine that was copied with its state does not get to use the lease, and
// says why; the original is not disturbed.
func duplicateNodeID(t *testing.T, c cluster) {
	ctx, h := t.Context(), c.Agents[0]
	clone, err := c.Host(ctx, "clone", 35)
	must(t, err)
	must(t, os.CopyFS(clone.StateDir, os.DirFS(h.StateDir)))
	c.unbroken(t, func() {
		must(t, c.StartAgent(clone))
		wait(t, "the copy to say that it is one", 20*time.Second, func() error {
			b, err := clone.Get(ctx, "/overlay-agent/overlay")
			if err != nil || !strings.Contains(string(b), "in use by another host") {
				return fmt.Errorf("%v: %s", err, b)
			}
			return nil
		})
		if _, err := clone.Get(ctx, "/readyz"); err == nil {
			t.Error("the copy says that it is ready")
		}
		if _, err := clone.Attach(ctx, "clonec", "dcos", lab.Docker); err == nil {
			t.Error("a container was attached on the copy")
		}
	})
	must(t, clone.Proc.Stop())
}

// The underlay's interface goes down and comes back, with its routes.
func underlayDown(t *testing.T, c cluster) {
	ctx, h := t.Context(), c.Agents[0]
	routes, err := h.Run(ctx, "ip", "route", "show", "default")
	must(t, err)
	must(t, h.Configure(ctx, "link set eth0 down"))
	if _, err := c.a.Netns.Ping(ctx, c.b.Addr(), 1); err == nil {
		t.Error("the containers reach each other without an underlay")
	}
	must(t, h.Configure(ctx, "link set eth0 up"))
	for line := range strings.Lines(routes) {
		must(t, h.Configure(ctx, "route replace "+strings.TrimSpace(line)))
	}
	waitPing(t, c.a.Netns, c.b.Addr(), healTime)
}

// Another default route, and none, change nothing between hosts of one link.
func defaultRouteChange(t *testing.T, c cluster) {
	ctx, h := t.Context(), c.Agents[0]
	routes, err := h.Run(ctx, "ip", "route", "show", "default")
	must(t, err)
	c.unbroken(t, func() {
		must(t, h.Configure(ctx, "route replace default via "+c.Outside.Underlay().String()))
		c.joins(t, "routed", 36, nil, c.Agents...)
		must(t, h.Configure(ctx, "route del default"))
		c.joins(t, "unrouted", 37, nil, c.Agents...)
	})
	for line := range strings.Lines(routes) {
		must(t, h.Configure(ctx, "route replace "+strings.TrimSpace(line)))
	}
}

// Terms are counted by CLOCK_BOOTTIME, which goes on while a machine sleeps: a
// host that slept for two days attaches nothing, says so, and goes on forwarding.
func clockJump(t *testing.T, c cluster) {
	ctx, h := t.Context(), c.Agents[0]
	status := func(seconds string) (string, error) {
		cmd := h.Netns.Command(ctx, "unshare", "--fork", "-T", "--boottime", seconds, filepath.Join(c.Bin, "m-overlay"))
		cmd.Env = append(os.Environ(), "CNI_COMMAND=STATUS", "CNI_PATH="+c.Bin)
		cmd.Stdin = strings.NewReader(fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "dcos", "type": "m-overlay", "runDir": %q, "ipam": {"type": "overlay-ipam"}}`, h.RunDir))
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := status("60"); err != nil {
		t.Errorf("a minute later: %v: %s", err, out)
	}
	if out, err := status("172800"); err == nil || !strings.Contains(out, `"code": 51`) {
		t.Errorf("two days later, without a renewal: %v: %s", err, out)
	}
	// An agent that wakes up then renews at once.
	h.Proc.Kill()
	c.unbroken(t, func() {
		must(t, c.StartAgent(h))
		must(t, h.WaitReady(ctx))
	})
}

// A host whose agent stands still forwards and attaches, whatever the agent was looking
// at, and its agent learns what it missed.
func suspend(t *testing.T, c cluster) {
	h := c.Agents[0]
	c.unbroken(t, func() {
		must(t, syscall.Kill(h.Proc.Pid(), syscall.SIGSTOP))
		defer func() { must(t, syscall.Kill(h.Proc.Pid(), syscall.SIGCONT)) }()
		extra := c.attach(t, 0, "asleep", lab.Docker)
		waitPing(t, extra.Netns, c.b.Addr(), healTime)
		must(t, extra.Remove(t.Context()))
		c.joins(t, "late", 38, func(*lab.Host) { must(t, syscall.Kill(h.Proc.Pid(), syscall.SIGCONT)) }, c.Agents...)
	})
}
