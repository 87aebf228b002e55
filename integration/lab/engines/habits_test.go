//go:build engines

package engines

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestPodmanOptions asks Podman for what its users ask for.
func TestPodmanOptions(t *testing.T) {
	ctx, c := newCluster(t)
	h := c.Hosts[0]
	e := &Podman{h}
	if err := e.Start(ctx); err != nil {
		t.Fatal(err)
	}
	subnet := func(network string) netip.Prefix { return halves(t, h, network, "docker_bridge")[0] }
	wanted := nthOf(subnet(IPv4), 77)
	const mac = "0a:58:00:00:00:77"

	one, err := e.Run(ctx, Spec{Name: "one", Network: IPv4, Args: []string{"--ip", wanted.String(), "--mac-address", mac}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(one.IPs, []netip.Addr{wanted}) {
		t.Errorf("--ip %s: got %s", wanted, one.IPs)
	}
	if out, err := one.Exec(ctx, "cat", "/sys/class/net/eth0/address"); err != nil || out != mac {
		t.Errorf("--mac-address %s: got %s, %v", mac, out, err)
	}
	if k, err := e.Run(ctx, Spec{Name: "taken", Network: IPv4, Args: []string{"--ip", wanted.String()}}); err == nil {
		t.Errorf("--ip %s was granted to two containers, %s and %s", wanted, one.Name, k.Name)
	} else if !strings.Contains(err.Error(), wanted.String()) {
		t.Errorf("the refusal of an address in use does not name it: %v", err)
	}
	if _, err := h.Exec(ctx, "podman", "rm", "-f", "-i", "taken"); err != nil {
		t.Error(err)
	}

	two, err := e.Run(ctx, Spec{Name: "two", Network: IPv4 + "," + Both})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range append(halves(t, h, Both, "docker_bridge"), subnet(IPv4)) {
		if !slices.ContainsFunc(two.IPs, p.Contains) {
			t.Errorf("on two networks: addresses %s, none in %s", two.IPs, p)
		}
	}
	if err := two.Ping(ctx, one.IPs[0]); err != nil {
		t.Error(err)
	}

	// Reload takes the networks away and attaches them anew, with the addresses
	// the container had.
	if _, err := h.Exec(ctx, "podman", "network", "reload", "one", "two"); err != nil {
		t.Error(err)
	}
	for _, k := range []*Container{one, two} {
		now, err := k.Addrs(ctx, "eth0")
		if err != nil || !slices.Contains(k.IPs, now[0]) {
			t.Errorf("%s after podman network reload: %s, %v; before %s", k.Name, now, err, k.IPs)
		}
	}
	if err := two.Ping(ctx, one.IPs[0]); err != nil {
		t.Error(err)
	}
	for _, k := range []*Container{one, two} {
		if err := k.Remove(ctx); err != nil {
			t.Error(err)
		}
	}
	nothingLeft(t, ctx, c, h)
}

// nthOf is the n-th address of a prefix, n being small.
func nthOf(p netip.Prefix, n int) netip.Addr {
	a := p.Masked().Addr()
	for range n {
		a = a.Next()
	}
	return a
}

// TestContainerdLives restarts containerd under running containers, kills a
// shim, and stops and removes sandboxes afterwards.
func TestContainerdLives(t *testing.T) {
	ctx, c := newCluster(t)
	for _, make := range []func(*Host) *Containerd{Containerd1, Containerd2} {
		h := c.Hosts[0]
		e := &CRI{make(h)}
		t.Run(e.name, func(t *testing.T) {
			if err := e.Start(ctx); err != nil {
				t.Fatal(err)
			}
			var ks []*Container
			for i := range 2 {
				k, err := e.Run(ctx, Spec{Name: fmt.Sprintf("pod%d", i), Ports: []string{fmt.Sprintf("808%d:80", i)}})
				if err != nil {
					t.Fatal(err)
				}
				ks = append(ks, k)
			}
			for _, end := range []func() error{e.Daemon.Stop, func() error { return e.Daemon.Kill() }} {
				if err := end(); err != nil {
					t.Fatal(err)
				}
				if err := e.StartDaemon(ctx); err != nil {
					t.Fatal(err)
				}
				talk(t, ctx, ks[0], ks[1])
				var p Pod
				if err := e.Client(ctx, &p, "inspect", ks[0].Sandbox); err != nil || !p.Ready || p.IPs[0] != ks[0].IPs[0].String() {
					t.Errorf("after containerd was restarted: %+v, %v; want the address %s", p, err, ks[0].IPs)
				}
			}

			// The shim is the parent of the sandbox's first process.
			pidFile := "/run/" + e.name + "/io.containerd.runtime.v2.task/k8s.io/" + ks[0].Sandbox + "/init.pid"
			if _, err := h.Exec(ctx, "sh", "-ec", `kill -KILL $(cut -d" " -f4 /proc/$(cat "$1")/stat)`, "sh", pidFile); err != nil {
				t.Fatal(err)
			}
			for _, k := range ks {
				// containerd notices some time after the shim's end; a kubelet repeats too.
				if err := Wait(ctx, func() error { return k.Remove(ctx) }); err != nil {
					t.Error(err)
				}
			}
			nothingLeft(t, ctx, c, h)
		})
	}
}

// TestStatus: containerd 2 asks the plugins whether they are ready, and tells.
func TestStatus(t *testing.T) {
	ctx, c := newCluster(t)
	h := c.Hosts[0]
	e := &CRI{Containerd2(h)}
	if err := e.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := e.networkReady(ctx); err != nil {
		t.Fatal(err)
	}
	state := h.File("/run/overlay/state.json")
	// Else it would publish again.
	if err := c.Agents[0].Kill(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(state, state+".away"); err != nil {
		t.Fatal(err)
	}
	err := Wait(ctx, func() error {
		var is map[string]string
		if err := e.Client(ctx, &is, "status"); err != nil {
			return err
		}
		if is["NetworkReady"] == "true" {
			return fmt.Errorf("still says that the network is ready, without a published state")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(state+".away", state); err != nil {
		t.Fatal(err)
	}
	if err := e.networkReady(ctx); err != nil {
		t.Error(err)
	}
}

// TestNomadHabits: Nomad executes every plugin without arguments and without an environment to
// learn its version, and one file it cannot read hides all networks.
func TestNomadHabits(t *testing.T) {
	ctx, c := newCluster(t)
	h := c.Hosts[0]
	for _, p := range []string{"m-overlay", "d-overlay", "overlay-ipam"} {
		cmd := h.Command(ctx, filepath.Join(PluginDir, p))
		cmd.Env = []string{}
		out, err := cmd.CombinedOutput()
		if err != nil || !regexp.MustCompile(`^CNI plugin `+p+` \S+\n`).Match(out) {
			t.Errorf("%s without arguments and environment: %q, %v", p, out, err)
		}
	}
	entries, err := os.ReadDir(h.File("/etc/cni/net.d"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !regexp.MustCompile(`^87-[a-z0-9]+\.conflist$`).MatchString(e.Name()) {
			t.Errorf("/etc/cni/net.d has %s", e.Name())
		}
	}
}

// TestDockerdBeside: dockerd rewrites the firewall of a host whenever it
// starts. Containers of the others are reached all the same.
func TestDockerdBeside(t *testing.T) {
	ctx, c := newCluster(t)
	var ks []*Container
	for _, h := range c.Hosts {
		e := &Podman{h}
		if err := e.Start(ctx); err != nil {
			t.Fatal(err)
		}
		// What dockerd does where it is the one to turn forwarding on.
		if _, err := h.Exec(ctx, "sh", "-ec", "iptables -P FORWARD DROP; ip6tables -P FORWARD DROP"); err != nil {
			t.Fatal(err)
		}
		k, err := e.Run(ctx, Spec{Name: "on-" + h.Name, Network: Both})
		if err != nil {
			t.Fatal(err)
		}
		ks = append(ks, k)
	}
	for _, tt := range []struct {
		name string
		make func(*Host) (*Docker, error)
	}{
		{"docker20", func(h *Host) (*Docker, error) { return Docker20(h), nil }},
		{"moby-iptables", func(h *Host) (*Docker, error) { return Moby(h, "iptables") }},
		{"moby-nftables", func(h *Host) (*Docker, error) { return Moby(h, "nftables") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := tt.make(c.Hosts[0])
			if err != nil {
				t.Log(err) // optional: the table says so
				return
			}
			besideDocker(t, ctx, c, d, ks)
		})
	}
}

// besideDocker lets two containers of another engine talk while dockerd starts,
// dies and starts again on the host of the first. They stay on the fast path, also
// beside a container on Docker's own bridge that publishes a port.
func besideDocker(t *testing.T, ctx context.Context, c *Cluster, d *Docker, ks []*Container) {
	h := d.Host
	talking := func(when string) {
		t.Helper()
		talkFast(t, ctx, c, ks)
		if t.Failed() {
			rules, _ := h.Exec(ctx, "nft", "list", "ruleset")
			t.Fatalf("%s; the firewall of %s:\n%s", when, h.Name, rules)
		}
	}
	talking("before dockerd")
	if err := d.StartDaemon(ctx); err != nil {
		t.Fatal(err)
	}
	talking("with dockerd")
	if err := d.Daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	talking("after dockerd was killed")
	if err := d.StartDaemon(ctx); err != nil {
		t.Fatal(err)
	}
	talking("with dockerd again")
	publishedBeside(t, ctx, c, d, ks)
	if err := d.Daemon.Stop(); err != nil {
		t.Fatal(err)
	}
}

// publishedBeside launches a container on Docker's own bridge. Its port answers the
// machine in the middle and the container of the other host, and those of the
// overlay stay on the fast path.
func publishedBeside(t *testing.T, ctx context.Context, c *Cluster, d *Docker, ks []*Container) {
	t.Helper()
	h := d.Host
	if _, err := h.Exec(ctx, "docker", "load", "-q", "-i", h.lab.images); err != nil {
		t.Fatal(err)
	}
	k, err := d.Run(ctx, Spec{Name: "beside-" + h.Name, Network: "bridge", Ports: []string{"8081:80"}})
	if err != nil {
		t.Fatal(err)
	}
	at := netip.AddrPortFrom(h.IP, 8081)
	fetch(t, ctx, c.LAN, at, k.Name)
	if page, err := ks[1].Get(ctx, at); err != nil || page != k.Name {
		t.Errorf("%s fetches from port %s of the other host: page %q, %v", ks[1].Name, at, page, err)
	}
	talkFast(t, ctx, c, ks)
	if err := k.Remove(ctx); err != nil {
		t.Error(err)
	}
}

// TestReboot crashes a host with running containers: after it is back nothing
// of them is, and new ones run.
func TestReboot(t *testing.T) {
	ctx, c := newCluster(t)
	h := c.Hosts[0]
	e, u := &Podman{h}, NewUCR(h)
	if err := e.Start(ctx); err != nil {
		t.Fatal(err)
	}
	before, err := e.Run(ctx, Spec{Name: "x", Network: Both})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Run(ctx, Spec{Name: "task", Network: Both}); err != nil {
		t.Fatal(err)
	}
	if err := h.Crash(); err != nil {
		t.Fatal(err)
	}
	if err := h.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	if err := c.StartAgent(0); err != nil {
		t.Fatal(err)
	}
	if err := c.AgentReady(ctx, 0); err != nil {
		t.Fatal(err)
	}
	// libcni's cache in /var/lib/cni is on disk, so not everything is gone.
	if left, err := c.Attached(ctx, h); err != nil || len(left) > 0 {
		t.Errorf("after a reboot: %s, %v", left, err)
	}
	// Podman keeps its containers over a reboot and attaches them anew.
	if _, err := h.Exec(ctx, "podman", "start", "x"); err != nil {
		t.Fatal(err)
	}
	after, err := before.Addrs(ctx, "eth0")
	if err != nil || len(after) != 2 {
		t.Errorf("addresses after a reboot: %s, %v", after, err)
	}
	p := &Podman{c.Hosts[1]}
	if err := p.Start(ctx); err != nil {
		t.Fatal(err)
	}
	far, err := p.Run(ctx, Spec{Name: "far", Network: Both})
	if err != nil {
		t.Fatal(err)
	}
	before.IPs = after
	talk(t, ctx, far, before)
	talk(t, ctx, before, far)
}
