//go:build engines

package engines

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	diff "github.com/google/go-cmp/cmp"
)

// programs is the directory of the programs under test.
func programs() string { return cmp.Or(os.Getenv("OVERLAY_BIN"), "../../../bin") }

// newCluster is a lab with two hosts of a cluster.
func newCluster(t *testing.T) (context.Context, *Cluster) {
	t.Helper()
	ctx, l := newLab(t)
	c, err := l.NewCluster(ctx, programs(), 2)
	if err != nil {
		t.Fatal(err)
	}
	return ctx, c
}

// launcher is one way to launch containers, and what it can be asked for.
type launcher struct {
	name     string // of the subtest and of its containers
	half     string // key of its bridge in the published state
	networks []string
	ports    bool
	on       func(*Host) Engine
	// runtime and named are what the coordinator is to know: named is what stands
	// before the container's name; "-": it is not told.
	runtime, named string
}

var allNetworks = []string{Both, IPv4, IPv6}

// launchers makes engines for the hosts of one test. Both ways of using a
// containerd share the daemon.
func launchers() []launcher {
	daemons := map[string]*Containerd{}
	shared := func(kind string, make func(*Host) *Containerd) func(*Host) *Containerd {
		return func(h *Host) *Containerd {
			key := kind + h.ID
			if daemons[key] == nil {
				daemons[key] = make(h)
			}
			return daemons[key]
		}
	}
	one, two := shared("1", Containerd1), shared("2", Containerd2)
	all, first := allNetworks, []string{Both}
	return []launcher{
		{"ctr1", "docker_bridge", first, false, func(h *Host) Engine { return &Ctr{Containerd: one(h)} }, "containerd", "-"},
		{"cri1", "docker_bridge", first, true, func(h *Host) Engine { return &CRI{one(h)} }, "containerd", "default/"},
		{"ctr2", "docker_bridge", first, false, func(h *Host) Engine { return &Ctr{Containerd: two(h)} }, "containerd", "-"},
		{"cri2", "docker_bridge", first, true, func(h *Host) Engine { return &CRI{two(h)} }, "containerd", "default/"},
		{"podman", "docker_bridge", all, true, func(h *Host) Engine { return &Podman{h} }, "podman", ""},
		{"docker", "docker_bridge", all, true, func(h *Host) Engine { return overlayDocker(Docker20(h)) }, "docker", ""},
		{"ucr", "mesos_bridge", all, true, func(h *Host) Engine { return NewUCR(h) }, "mesos", "-"},
	}
}

// mobies are launchers for the next Docker, where that was built. They do not run
// beside another Docker or Debian's containerd.
func mobies(t *testing.T, c *Cluster) []launcher {
	t.Helper()
	var all []launcher
	for _, firewall := range []string{"iptables", "nftables"} {
		if _, err := Moby(c.Hosts[0], firewall); err != nil {
			t.Log(err) // optional: the table says so
			return nil
		}
		all = append(all, launcher{"moby-" + firewall, "docker_bridge", allNetworks, true, func(h *Host) Engine {
			d, err := Moby(h, firewall)
			if err != nil {
				t.Fatal(err)
			}
			return overlayDocker(d)
		}, "docker", ""})
	}
	return all
}

// overlayDocker waits, when it starts, for the networks that the agent makes.
func overlayDocker(d *Docker) *Docker {
	d.Networks = allNetworks
	return d
}

// TestRuntimes launches containers through every runtime on two hosts, and lets
// them talk.
func TestRuntimes(t *testing.T) {
	ctx, c := newCluster(t)
	results := newTable(t)
	testRuntimes(t, ctx, c, launchers(), results)
	if next := mobies(t, c); len(next) > 0 {
		// On hosts of their own: it would use a containerd that runs there, and
		// Debian's is too old for it.
		ctx, c := newCluster(t)
		testRuntimes(t, ctx, c, next, results)
	}
}

func testRuntimes(t *testing.T, ctx context.Context, c *Cluster, all []launcher, results *table) {
	for _, r := range all {
		t.Run(r.name, func(t *testing.T) {
			engines := []Engine{r.on(c.Hosts[0]), r.on(c.Hosts[1])}
			for _, e := range engines {
				if err := e.Start(ctx); err != nil {
					t.Fatal(err)
				}
				if d, ok := e.(*Docker); ok { // makes room for the next one
					defer func() {
						if err := d.Daemon.Stop(); err != nil {
							t.Error(err)
						}
					}()
				}
			}
			version, err := engines[0].Version(ctx)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { results.add(t, engines[0].Name(), version) })
			for _, network := range r.networks {
				t.Run(network, func(t *testing.T) { testPair(t, ctx, c, r, engines, network) })
			}
		})
	}
}

// testPair launches a container on each of two hosts on one network, lets each
// ping and read the other, and removes them.
func testPair(t *testing.T, ctx context.Context, c *Cluster, r launcher, engines []Engine, network string) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var pair []*Container
	for i, e := range engines {
		h := c.Hosts[i]
		s := Spec{Name: fmt.Sprintf("%s-%s-%s", r.name, network, h.Name), Network: network}
		if r.ports {
			s.Ports = []string{"8080:80"}
		}
		k, err := e.Run(ctx, s)
		if err != nil {
			t.Fatal(err)
		}
		pair = append(pair, k)
		checkAddrs(t, ctx, h, k, network, r.half)
		listedAs(t, ctx, c, k, r)
	}
	sameDatapath(t, ctx, c)
	if !r.ports {
		talkFast(t, ctx, c, pair)
	} else { // not on the fast path
		talk(t, ctx, pair[0], pair[1])
		talk(t, ctx, pair[1], pair[0])
		hostPorts(t, ctx, c, pair, network)
	}
	for i, k := range pair {
		if err := k.Remove(ctx); err != nil {
			t.Error(err)
		}
		nothingLeft(t, ctx, c, c.Hosts[i])
	}
}

// takesDatapath is the way that hosts take: the one that OVERLAY_DATAPATH names;
// without it agents decide for the fast path, which the hosts of the lab suit, with
// whatever rules the runtimes have.
func takesDatapath() string {
	if want := os.Getenv("OVERLAY_DATAPATH"); want != "auto" {
		return cmp.Or(want, "ebpf")
	}
	return "ebpf"
}

// sameDatapath expects every host to take the way that takesDatapath names.
func sameDatapath(t *testing.T, ctx context.Context, c *Cluster) {
	t.Helper()
	want := takesDatapath()
	for _, h := range c.Hosts {
		if err := Wait(ctx, func() error {
			taken, reason, err := c.Datapath(h)
			if err == nil && taken != want {
				err = fmt.Errorf("%s takes the datapath %s, want %s: %s", h.Name, taken, want, reason)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	}
}

// listedAs looks for a container in the view of the cluster, under what its engine
// calls it.
func listedAs(t *testing.T, ctx context.Context, c *Cluster, k *Container, r launcher) {
	t.Helper()
	if len(k.IPs) == 0 {
		return // said already
	}
	want, name := cmp.Or(k.Sandbox, k.ID), r.named+k.Name
	if r.named == "-" {
		name = ""
	}
	err := Wait(ctx, func() error {
		list, err := c.Containers(ctx, k.IPs[0].String())
		if err != nil {
			return err
		}
		if len(list) != 1 || list[0].ID != want || list[0].Runtime != r.runtime || list[0].Name != name || slices.ContainsFunc(k.IPs, func(a netip.Addr) bool { return !slices.Contains(list[0].Addresses, a) }) {
			return fmt.Errorf("%s is listed as %+v, want id %s, runtime %s and name %q", k.Name, list, want, r.runtime, name)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// checkAddrs compares the addresses an engine reports with those the container
// has, and with the half of the subnet that the host has for them.
func checkAddrs(t *testing.T, ctx context.Context, h *Host, k *Container, network, half string) {
	t.Helper()
	want := halves(t, h, network, half)
	if len(k.IPs) != len(want) {
		t.Errorf("%s: reported addresses %v, want one of each of %v", k.Name, k.IPs, want)
	}
	for _, ip := range k.IPs {
		if !slices.ContainsFunc(want, func(p netip.Prefix) bool { return p.Contains(ip) }) {
			t.Errorf("%s: address %s is in none of %v", k.Name, ip, want)
		}
	}
	has, err := k.Addrs(ctx, "eth0")
	if err != nil {
		t.Error(err)
	}
	// What Docker before 28 adds where the overlay has no IPv4.
	has = slices.DeleteFunc(has, func(a netip.Addr) bool { return a.Is4() && a.IsLinkLocalUnicast() })
	sort := func(a []netip.Addr) []netip.Addr { return slices.SortedFunc(slices.Values(a), netip.Addr.Compare) }
	if d := diff.Diff(sort(has), sort(k.IPs), diff.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("%s: addresses it has (-) and the engine reports (+):\n%s", k.Name, d)
	}
}

// halves are the prefixes of one bridge of a host, from its published state.
func halves(t *testing.T, h *Host, overlay, bridge string) []netip.Prefix {
	t.Helper()
	b, err := os.ReadFile(h.File("/run/overlay/state.json"))
	if err != nil {
		t.Fatal(err)
	}
	var state struct{ Overlays []map[string]json.RawMessage }
	if err := json.Unmarshal(b, &state); err != nil {
		t.Fatal(err)
	}
	for _, o := range state.Overlays {
		var info struct{ Name string }
		var br struct{ IP, IP6 string }
		if json.Unmarshal(o["info"], &info) != nil || info.Name != overlay {
			continue
		}
		if err := json.Unmarshal(o[bridge], &br); err != nil {
			t.Fatal(err)
		}
		var prefixes []netip.Prefix
		for _, s := range []string{br.IP, br.IP6} {
			if s != "" {
				prefixes = append(prefixes, netip.MustParsePrefix(s))
			}
		}
		return prefixes
	}
	t.Fatalf("%s publishes no overlay %s", h.Name, overlay)
	return nil
}

// talk lets one container ping the other at all its addresses and fetch its page.
func talk(t *testing.T, ctx context.Context, from, to *Container) {
	t.Helper()
	for _, ip := range to.IPs {
		if err := from.Ping(ctx, ip); err != nil {
			t.Errorf("%s pings %s: %v", from.Name, to.Name, err)
			continue
		}
		if page, err := from.Get(ctx, netip.AddrPortFrom(ip, 80)); err != nil || page != to.Name {
			t.Errorf("%s fetches from %s: page %q, %v", from.Name, to.Name, page, err)
		}
	}
}

// talkFast lets a pair without host ports talk, and expects both hosts to take it
// past the kernel where they take that way at all.
func talkFast(t *testing.T, ctx context.Context, c *Cluster, pair []*Container) {
	t.Helper()
	err := Wait(ctx, func() error { // an agent attaches them a moment later
		var before [2]float64
		for i := range pair {
			n, err := c.FastPackets(ctx, c.Hosts[i])
			if err != nil {
				return err
			}
			before[i] = n
		}
		talk(t, ctx, pair[0], pair[1])
		talk(t, ctx, pair[1], pair[0])
		for i := range pair {
			n, err := c.FastPackets(ctx, c.Hosts[i])
			if err != nil {
				return err
			}
			if took := n - before[i]; (took > 0) != (takesDatapath() == "ebpf") {
				return fmt.Errorf("the fast path of %s took %v packets of what %s and %s said", c.Hosts[i].Name, took, pair[0].Name, pair[1].Name)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// hostPorts fetches the containers' pages at port 8080 of their hosts, from
// the machine in the middle and from the container of the other host.
func hostPorts(t *testing.T, ctx context.Context, c *Cluster, pair []*Container, network string) {
	t.Helper()
	for i, k := range pair {
		at := netip.AddrPortFrom(c.Hosts[i].IP, 8080)
		if network == IPv6 {
			at = netip.AddrPortFrom(c.Hosts[i].IP6, 8080)
		}
		fetch(t, ctx, c.LAN, at, k.Name)
		if page, err := pair[1-i].Get(ctx, at); err != nil || page != k.Name {
			t.Errorf("%s fetches from port %s of the other host: page %q, %v", pair[1-i].Name, at, page, err)
		}
	}
}

// nothingLeft expects no trace of containers on a host, a moment later.
func nothingLeft(t *testing.T, ctx context.Context, c *Cluster, h *Host) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err := Wait(ctx, func() error {
		left, err := c.Leftovers(ctx, h)
		if err == nil && left != "" {
			err = fmt.Errorf("left on %s:\n%s", h.Name, left)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
