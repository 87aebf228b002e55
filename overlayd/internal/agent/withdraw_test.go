package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
)

// behind changes what the coordinator has stored while no agent can reach it.
func (c *cluster) behind(f func(*coordinator.Coordinator)) {
	t := c.t
	t.Helper()
	c.stop()
	log := slog.New(slog.DiscardHandler)
	store, err := bbolt.Open(filepath.Join(c.dir, "coordinator.db"), log)
	must(t, err)
	coord, err := coordinator.New(t.Context(), coordinator.Options{Network: c.Network, Store: store, Term: c.Term, Log: log, Version: "test"})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- coord.Run(ctx) }()
	f(coord)
	cancel()
	must(t, <-ended)
	must(t, store.Close())
	c.start()
}

// give takes a host's lease from it and gives it to another one, which gets what the
// host had.
func (c *cluster) give(from, to, ip string) (was, is conf.Lease) {
	t := c.t
	t.Helper()
	c.behind(func(coord *coordinator.Coordinator) {
		for _, a := range coord.Agents() {
			if a.AgentID == from {
				was = a.Lease
			}
		}
		_, err := coord.Delete(t.Context(), []string{from})
		must(t, err)
		is, err = coord.Register(t.Context(), api.RegisterRequest{AgentID: to, AgentIP: addr(ip), Version: "test"})
		must(t, err)
	})
	return was, is
}

// container is a veth pair with one end in a bridge and the other in a namespace.
type container struct {
	t    *testing.T
	name string
}

func (h *testHost) container(name, bridge, address, gateway string) container {
	t := h.t
	t.Helper()
	c := container{t, name}
	for _, args := range [][]string{
		{"ip", "netns", "add", c.ns()},
		{"ip", "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", c.ns()},
		{"ip", "link", "set", name, "master", bridge, "up"},
		{"ip", "-n", c.ns(), "addr", "add", address, "dev", "eth0"},
		{"ip", "-n", c.ns(), "link", "set", "eth0", "up"},
		{"ip", "-n", c.ns(), "route", "add", "default", "via", gateway},
	} {
		must(t, run(args...))
	}
	t.Cleanup(c.remove)
	return c
}

func (c container) ns() string {
	return fmt.Sprintf("withdraw-%s-%s", c.name, strings.ToLower(c.t.Name()))
}

func (c container) remove() { run("ip", "netns", "del", c.ns()) }

// reaches returns nil if an address answers.
func (c container) reaches(address string) error {
	return run("ip", "netns", "exec", c.ns(), "ping", "-c1", "-W1", address)
}

func run(args ...string) error {
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// A host's lease is given to another while it cannot hear of it. It withdraws: packets
// follow the new owner, its containers stay where they are and are counted, nothing is
// attached, also after a restart; and when the last one has gone, it takes its new
// lease. The files of the runtimes stay all the while.
func TestSubnetGrantedElsewhere(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.tune = func(tm *timing) { tm.drain = 50 * time.Millisecond }
	h.start()
	h.ready()
	first := h.container("c1", "m-dcos", "9.0.0.5/25", "9.0.0.1")
	second := h.container("c2", "d-dcos", "9.0.0.135/25", "9.0.0.129")
	neighbour := h.container("c3", "m-dcos", "9.0.0.6/25", "9.0.0.1")
	eventually(t, "the container reaches its gateway", func() error { return first.reaches("9.0.0.1") })
	eventually(t, "and its neighbour", func() error { return first.reaches("9.0.0.6") })

	was, is := c.give(h.id(), "new", "172.17.0.9")
	if was.Grants[0].Subnet != is.Grants[0].Subnet {
		t.Fatalf("the new one has %s, want %s", is.Grants[0].Subnet, was.Grants[0].Subnet)
	}
	withheld := func(containers string) {
		t.Helper()
		s := h.published("the overlay is withheld", func(s conf.State) bool {
			o, _ := s.Overlay("dcos")
			return o.State != nil && o.State.Status == conf.StatusFailed && strings.Contains(o.State.Error, containers)
		})
		if o, _ := s.Overlay("dcos"); o.MesosBridge != nil || o.DockerBridge != nil || s.Lease.Lost != "" ||
			!strings.Contains(o.State.Error, "subnet 9.0.0.0/24 was granted to another host") || !strings.Contains(o.State.Error, "9.0.1.0/24 is set up when nothing is left") {
			t.Errorf("published: %+v %s; lost %q", o, o.State.Error, s.Lease.Lost)
		}
		eventually(t, "what goes there goes to who has it", func() error { return hasRoute(prefix("9.0.0.0/24")) })
		for _, bridge := range []string{"m-dcos", "d-dcos"} {
			l, err := netlink.LinkByName(bridge)
			if errors.As(err, new(netlink.LinkNotFoundError)) {
				continue // nothing is left on it
			}
			must(t, err)
			addrs, err := netlink.AddrList(l, netlink.FAMILY_V4)
			must(t, err)
			if len(addrs) > 0 {
				t.Errorf("%s has %v", bridge, addrs)
			}
		}
		routes, err := netlink.RouteGet(addr("9.0.0.5").AsSlice())
		must(t, err)
		vtep, err := netlink.LinkByName(conf.VTEPName)
		must(t, err)
		if len(routes) != 1 || routes[0].LinkIndex != vtep.Attrs().Index {
			t.Errorf("packets to 9.0.0.5 go %v", routes)
		}
	}
	withheld("3 containers here are left")
	h.statusAt("the coordinator knows", func(s map[string]conf.OverlayStatus) bool {
		return strings.Contains(s["dcos"].Error, "3 containers here are left")
	})
	o, _ := h.document().Overlay("dcos6")
	if o.State.Status != conf.StatusOK {
		t.Errorf("the other overlay, which is no other host's: %+v", o.State)
	}
	if err := errors.Join(first.reaches("9.0.0.6"), exists(filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist"), true), exists(filepath.Join(h.opts.UCRConfDir, "dcos.conf"), true)); err != nil {
		t.Errorf("what was there goes on: %v", err)
	}
	h.restart()
	withheld("3 containers here are left")
	first.remove()
	withheld("2 containers here are left")
	second.remove()
	withheld("1 container here is left")
	neighbour.remove()
	s := h.published("the new lease is set up", func(s conf.State) bool {
		o, _ := s.Overlay("dcos")
		return o.State != nil && o.State.Status == conf.StatusOK
	})
	if o, _ := s.Overlay("dcos"); o.Subnet != prefix("9.0.1.0/24") {
		t.Errorf("subnet %s", o.Subnet)
	}
	eventually(t, "the bridges of the new lease", func() error {
		return errors.Join(hasAddr("m-dcos", "9.0.1.1/25"), hasAddr("d-dcos", "9.0.1.129/25"), hasRoute(prefix("9.0.0.0/24")))
	})
	h.ready()
	h.restart()
	h.ready()
	if code, body, err := h.get(api.PathReady); err != nil || code != http.StatusOK {
		t.Errorf("%d %s %v", code, body, err)
	}
}

// A host that has lost a further block alone keeps the overlay: the block goes, and
// everything else stays as it is, while nobody but a peer says so and when the
// coordinator does.
func TestFurtherBlockElsewhere(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	first := h.container("c1", "m-dcos", "9.0.0.5/25", "9.0.0.1")
	c.stop()
	h.stop()
	const lost = "9.0.7.0/24"
	var l savedLease
	must(t, conf.ReadJSON(h.stored(leaseFile), &l))
	l.Lease.Grants[0].Blocks = []conf.Block{{Subnet: prefix("9.0.6.0/24")}, {Subnet: prefix(lost)}}
	must(t, conf.WriteJSON(h.stored(leaseFile), l, 0o600))
	must(t, conf.WriteJSON(h.stored(peersFile), savedPeers{
		AgentID: l.Lease.AgentID, ClusterID: l.Lease.ClusterID,
		Peers: []conf.Peer{testPeer("new", 9, 1000, lost)},
	}, 0o600))
	h.start()
	s := h.published("the loss", func(s conf.State) bool {
		o, _ := s.Overlay("dcos")
		return s.Lease.Lost != "" && o.State != nil && o.State.Status != conf.StatusConfiguring
	})
	o, _ := s.Overlay("dcos")
	if o.State.Status != conf.StatusOK || o.Subnet != prefix("9.0.0.0/24") || o.MesosBridge == nil ||
		len(o.Blocks) != 1 || o.Blocks[0].Subnet != prefix("9.0.6.0/24") {
		t.Errorf("published: %+v %+v", o, o.State)
	}
	eventually(t, "what is left is set up, and what is lost leads to who has it", func() error {
		return errors.Join(hasAddr("m-dcos", "9.0.0.1/25"), hasAddr("m-dcos", "9.0.6.1/25"), hasRoute(prefix(lost)), first.reaches("9.0.0.1"))
	})
	if err := hasAddr("m-dcos", "9.0.7.1/25"); err == nil {
		t.Error("the bridge has an address of the lost block")
	}
	c.start() // which knows of no block
	h.ready()
	s = h.published("the lease of the coordinator", func(s conf.State) bool {
		o, _ := s.Overlay("dcos")
		return s.Lease.Lost == "" && len(o.Blocks) == 0
	})
	if o, _ := s.Overlay("dcos"); o.State.Status != conf.StatusOK || o.Subnet != prefix("9.0.0.0/24") {
		t.Errorf("published: %+v %+v", o, o.State)
	}
	if err := first.reaches("9.0.0.1"); err != nil {
		t.Error(err)
	}
}

// A host learns of it from its peers alone, because the coordinator does not answer it:
// it withdraws all the same, and counts.
func TestSubnetElsewhereByPeers(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	first := h.container("c1", "m-dcos", "9.0.0.5/25", "9.0.0.1")
	c.stop()
	h.stop()
	var l savedLease
	must(t, conf.ReadJSON(h.stored(leaseFile), &l))
	must(t, conf.WriteJSON(h.stored(peersFile), savedPeers{
		AgentID: l.Lease.AgentID, ClusterID: l.Lease.ClusterID,
		Peers: []conf.Peer{testPeer("new", 9, 1000, "9.0.0.0/24")},
	}, 0o600))
	h.start()
	h.published("the loss", func(s conf.State) bool {
		o, _ := s.Overlay("dcos")
		return s.Lease.Lost != "" && o.State != nil && strings.Contains(o.State.Error, "1 container here is left")
	})
	if err := hasRoute(prefix("9.0.0.0/24")); err != nil {
		t.Error(err)
	}
	c.start() // which knows that the subnet is ours
	h.ready()
	eventually(t, "the container reaches its gateway again", func() error { return first.reaches("9.0.0.1") })
}
