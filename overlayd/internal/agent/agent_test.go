package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// A host joins: lease, kernel, document, files, status.
func TestJoin(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("master", "172.17.0.2")
	h := newHost(c)
	h.opts.Listen = "127.0.0.1:0"
	before := ipam.Boottime()
	h.start()
	h.ready()

	boot, err := conf.BootID()
	must(t, err)
	doc := h.document()
	left := time.Duration(doc.Lease.ExpiresBoottime) - before
	if left < 23*time.Hour || left > 23*time.Hour+time.Minute {
		t.Errorf("the lease ends in %s, want a day less the margin of an hour", left)
	}
	want := fmt.Sprintf(`{
  "agent_id": %q,
  "boot_id": %q,
  "configuration_attempts": 1,
  "cooling_seconds": 150,
  "coordinators": [
    "%s"
  ],
  "ip": "172.17.0.4",
  "lease": {
    "epoch": %d,
    "expires_boottime_ns": %d
  },
  "mtu": 1450,
  "overlays": [
    {
      "backend": {
        "vxlan": {
          "vni": 1024,
          "vtep_ip": "44.128.0.2/20",
          "vtep_ip6": "fd01:a::2/64",
          "vtep_mac": "70:b3:d5:80:00:02",
          "vtep_name": "vtep1024"
        }
      },
      "docker_bridge": {
        "ip": "9.0.1.128/25",
        "name": "d-dcos"
      },
      "info": {
        "name": "dcos",
        "prefix": 24,
        "subnet": "9.0.0.0/8"
      },
      "mesos_bridge": {
        "ip": "9.0.1.0/25",
        "name": "m-dcos"
      },
      "state": {
        "status": "STATUS_OK"
      },
      "subnet": "9.0.1.0/24"
    },
    {
      "backend": {
        "vxlan": {
          "vni": 1024,
          "vtep_ip": "44.128.0.2/20",
          "vtep_ip6": "fd01:a::2/64",
          "vtep_mac": "70:b3:d5:80:00:02",
          "vtep_name": "vtep1024"
        }
      },
      "docker_bridge": {
        "ip6": "fd01:b::1:8000:0:0/81",
        "name": "d-dcos6"
      },
      "info": {
        "name": "dcos6",
        "prefix6": 80,
        "subnet6": "fd01:b::/64"
      },
      "mesos_bridge": {
        "ip6": "fd01:b:0:0:1::/81",
        "name": "m-dcos6"
      },
      "state": {
        "status": "STATUS_OK"
      },
      "subnet6": "fd01:b:0:0:1::/80"
    }
  ],
  "version": "1.2.3"
}`, h.id(), boot, c.urls()[0], doc.Lease.Epoch, doc.Lease.ExpiresBoottime)
	raw, err := os.ReadFile(h.path(conf.StateFile))
	must(t, err)
	if diff := cmp.Diff(want, indented(t, raw)); diff != "" {
		t.Errorf("published document (-want +got):\n%s", diff)
	}
	for _, path := range []string{api.PathAgentOverlay, api.PathAgentOverlays} {
		code, body, err := h.get(path)
		if err != nil || code != http.StatusOK || body != string(raw) {
			t.Errorf("GET %s: %d %v %s; want the published document", path, code, err, body)
		}
	}

	for link, address := range map[string]string{
		conf.VTEPName: "44.128.0.2/20", "m-dcos": "9.0.1.1/25", "d-dcos": "9.0.1.129/25",
		"m-dcos6": "fd01:b::1:0:0:1/81", "d-dcos6": "fd01:b::1:8000:0:1/81",
	} {
		if err := hasAddr(link, address); err != nil {
			t.Error(err)
		}
	}
	eventually(t, "the other host is a peer", func() error {
		return errors.Join(hasRoute(prefix("9.0.0.0/24")), hasRoute(prefix("fd01:b::/80")))
	})
	for _, path := range []string{
		filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist"), filepath.Join(h.opts.CNIConfDir, "87-dcos6.conflist"),
		filepath.Join(h.opts.UCRConfDir, "dcos.conf"), filepath.Join(h.opts.UCRConfDir, "dcos6.conf"),
	} {
		b, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(b), h.opts.RunDir) {
			t.Errorf("%s: %v %s; want it to name the run directory", path, err, b)
		}
	}
	h.statusAt("status at the coordinator", allOK)

	h.stop()
	for _, path := range []string{h.stored(leaseFile), h.stored(peersFile), h.stored(idFile)} {
		if err := exists(path, true); err != nil {
			t.Error(err)
		}
	}
	if err := hasAddr("m-dcos", "9.0.1.1/25"); err != nil {
		t.Errorf("after the agent ended: %v", err)
	}
	if err := exists(h.path(conf.SocketFile), false); err != nil {
		t.Error(err)
	}
}

func indented(t *testing.T, b []byte) string {
	t.Helper()
	var v any
	must(t, json.Unmarshal(b, &v))
	out, err := json.MarshalIndent(json.RawMessage(strings.TrimSpace(string(b))), "", "  ")
	must(t, err)
	return string(out)
}

// With the coordinator down a restarted agent, even after its kernel objects
// are gone, has everything back, the end of its lease included.
func TestRestartWithoutCoordinator(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	c.join("peer", "172.17.0.3")
	eventually(t, "peer", func() error { return hasRoute(prefix("9.0.1.0/24")) })
	before := h.document()

	c.stop()
	h.stop()
	for _, name := range []string{"m-dcos", "d-dcos", "m-dcos6", "d-dcos6", conf.VTEPName} {
		l, err := netlink.LinkByName(name)
		must(t, err)
		must(t, netlink.LinkDel(l))
	}
	must(t, os.RemoveAll(h.opts.RunDir))
	h.start()
	h.ready()
	if err := errors.Join(hasAddr("d-dcos", "9.0.0.129/25"), hasRoute(prefix("9.0.1.0/24")), hasRoute(prefix("fd01:b:0:0:1::/80"))); err != nil {
		t.Error(err)
	}
	after := h.published("the outage is told", func(s conf.State) bool { return s.Lease.Error != "" })
	after.Lease.Error = ""
	if diff := cmp.Diff(before, after, compareNetip); diff != "" {
		t.Errorf("published document (-before +after):\n%s", diff)
	}

	c.start()
	c.join("late", "172.17.0.5")
	eventually(t, "late peer", func() error { return hasRoute(prefix("9.0.2.0/24")) })
	h.published("the outage is over", func(s conf.State) bool { return s.Lease.Error == "" })
	if n := strings.Count(h.log.String(), "lease not renewed"); n != 1 {
		t.Errorf("the outage was logged %d times, want once", n)
	}
}

// An agent that was killed before it wrote its peers does not take the routes
// to them away: it looks at what the coordinator says first.
func TestForgottenPeers(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	c.join("peer", "172.17.0.3")
	c.join("other", "172.17.0.5")
	both := func() error { return errors.Join(hasRoute(prefix("9.0.1.0/24")), hasRoute(prefix("9.0.2.0/24"))) }
	eventually(t, "peers", both)
	h.stop()
	c.stop()
	var p savedPeers
	must(t, conf.ReadJSON(h.stored(peersFile), &p))
	p.Revision, p.Peers = 0, nil
	must(t, conf.WriteJSON(h.stored(peersFile), p, 0o600))
	h.start()
	h.ready()
	if err := both(); err != nil {
		t.Errorf("before the coordinator answered: %v", err)
	}

	h.stop() // so that it does not see the deletion happen
	c.start()
	_, err := c.client().Delete(t.Context(), []string{"other"})
	must(t, err)
	h.start()
	eventually(t, "the peer that is gone has gone", func() error {
		if hasRoute(prefix("9.0.2.0/24")) == nil {
			return errors.New("its route is there")
		}
		return nil
	})
	if err := hasRoute(prefix("9.0.1.0/24")); err != nil {
		t.Errorf("after the coordinator answered: %v", err)
	}
}

// After a reboot, with the coordinator down: everything is back, and the time
// the machine was off counts.
func TestRebootWithoutCoordinator(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	h.stop()
	c.stop()
	var saved savedLease
	must(t, conf.ReadJSON(h.stored(leaseFile), &saved))
	saved.Renewed = renewal{BootID: "another", Boottime: 5000 * time.Hour, Wall: time.Now().Add(-2 * time.Hour)}
	must(t, conf.WriteJSON(h.stored(leaseFile), saved, 0o600))
	must(t, os.RemoveAll(h.opts.RunDir))
	for range 2 { // the second time within the boot
		h.start()
		h.ready()
		left := time.Duration(h.document().Lease.ExpiresBoottime) - ipam.Boottime()
		if left < 21*time.Hour-time.Minute || left > 21*time.Hour {
			t.Errorf("the lease ends in %s, want a day less two hours and the margin of one", left)
		}
		h.stop()
	}

	saved.Renewed.Wall = time.Now().Add(-48 * time.Hour)
	must(t, conf.WriteJSON(h.stored(leaseFile), saved, 0o600))
	h.start()
	h.notReady("renewed in time")
	if err := hasAddr("d-dcos", "9.0.0.129/25"); err != nil {
		t.Error(err)
	}
}

// Damaged files are fetched again; a damaged identity is not made up for.
func TestDamagedFiles(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("peer", "172.17.0.3")
	h := newHost(c)
	h.start()
	h.ready()
	before := h.document()
	for name, content := range map[string]string{"empty": "", "truncated": `{"lease":{"agent_`, "garbage": "\x00\x01\xff"} {
		h.stop()
		must(t, os.WriteFile(h.stored(leaseFile), []byte(content), 0o600))
		must(t, os.WriteFile(h.stored(peersFile), []byte(content), 0o600))
		must(t, os.WriteFile(h.path(conf.StateFile), []byte(content), 0o600))
		h.start()
		h.ready()
		if got := h.document(); got.AgentID != before.AgentID || got.Lease.Epoch != before.Lease.Epoch || len(got.Overlays) != 2 {
			t.Errorf("%s: published %+v, want the lease of before", name, got)
		}
		eventually(t, "peer", func() error { return hasRoute(prefix("9.0.0.0/24")) })
		eventually(t, "files are whole again", func() error {
			var l savedLease
			var p savedPeers
			if err := errors.Join(conf.ReadJSON(h.stored(leaseFile), &l), conf.ReadJSON(h.stored(peersFile), &p)); err != nil {
				return err
			}
			if len(p.Peers) != 1 {
				return fmt.Errorf("peers %v", p.Peers)
			}
			return nil
		})
	}

	// Files that cannot be written are told of, and everything else works.
	h.stop()
	for _, path := range []string{h.stored(leaseFile), h.stored(peersFile)} {
		must(t, os.Remove(path))
		must(t, os.Mkdir(path, 0o700))
	}
	h.start()
	h.ready()
	eventually(t, "peer", func() error { return hasRoute(prefix("9.0.0.0/24")) })
	eventually(t, "it is told", func() error {
		if log := h.log.String(); !strings.Contains(log, "storing the lease") || !strings.Contains(log, "storing the peers") {
			return errors.New("not yet")
		}
		return nil
	})

	h.stop()
	must(t, os.WriteFile(h.stored(idFile), []byte("\x00"), 0o600))
	a, err := New(h.opts)
	must(t, err)
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "does not hold an agent id") {
		t.Errorf("damaged agent id: error %v", err)
	}
}

// A coordinator that comes back, with the same store, is told and asked again.
func TestCoordinatorRestarts(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	h.statusAt("status", allOK)
	before := h.document()
	for n := range 3 {
		c.stop()
		c.start()
		c.join(fmt.Sprint("peer", n), fmt.Sprintf("172.17.0.%d", 5+n))
		eventually(t, "new peer", func() error { return hasRoute(prefix(fmt.Sprintf("9.0.%d.0/24", n+1))) })
		h.statusAt("status after the restart", allOK)
	}
	after := h.published("no error is left", func(s conf.State) bool { return s.Lease.Error == "" })
	if diff := cmp.Diff(before, after, compareNetip); diff != "" {
		t.Errorf("published document (-before +after):\n%s", diff)
	}
}

// While the coordinator is away the way to it may be a detour with another
// source address. What the other hosts send to stays as long as it is there.
func TestAgentIPStaysDuringOutage(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.opts.IP, h.renew = netip.Addr{}, 50*time.Millisecond
	h.start()
	h.ready()
	ip := h.document().IP
	refused := func(times int) {
		t.Helper()
		eventually(t, "the lease is not renewed", func() error {
			if n := strings.Count(h.log.String(), "lease not renewed"); n < times {
				return fmt.Errorf("%d times", n)
			}
			return nil
		})
	}

	c.stop()
	refused(1)
	routeFrom(t, "172.17.0.9")
	h.restart()
	refused(2)
	h.published("the document is of this run", func(s conf.State) bool { return s.Lease.Error != "" })
	if now := h.document().IP; now != ip || strings.Contains(h.log.String(), "agent IP changed") {
		t.Errorf("agent IP %s, before the outage it was %s", now, ip)
	}

	c.start()
	h.published("the coordinator has heard of the other address", func(s conf.State) bool { return s.IP == addr("172.17.0.9") })
}

// The agent IP is found, and followed when it changes; the lease stays.
func TestAgentIPChanges(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.opts.IP = netip.Addr{}
	routeFrom(t, "172.17.0.6")
	h.start()
	h.ready()
	before := h.document()
	if before.IP != addr("172.17.0.6") {
		t.Fatalf("agent IP %s, want the source address towards the coordinator", before.IP)
	}
	id := h.id()

	// While the agent is away, the coordinator down too.
	h.stop()
	c.stop()
	routeFrom(t, "172.17.0.7")
	u0, err := netlink.LinkByName("u0")
	must(t, err)
	old, err := netlink.ParseAddr("172.17.0.6/24")
	must(t, err)
	must(t, netlink.AddrDel(u0, old))
	h.start()
	h.ready()
	h.published("the new IP is used at once", func(s conf.State) bool { return s.IP == addr("172.17.0.7") })
	if local := vtepLocal(t); local != "172.17.0.7" {
		t.Errorf("the VTEP sends from %s, want 172.17.0.7", local)
	}
	c.start()
	eventually(t, "the coordinator knows the new IP", func() error { return agentAt(c, id, "172.17.0.7") })

	// While both run. Something stirs in the kernel when an address changes.
	routeFrom(t, "172.17.0.8")
	d, err := netlink.LinkByName("d-dcos")
	must(t, err)
	must(t, netlink.LinkDel(d))
	eventually(t, "the coordinator knows the newest IP", func() error { return agentAt(c, id, "172.17.0.8") })
	after := h.published("the newest IP", func(s conf.State) bool {
		return s.IP == addr("172.17.0.8") && s.Lease.Error == "" && s.Lease.Epoch > before.Lease.Epoch
	})
	if h.id() != id || after.Overlays[0].Subnet != before.Overlays[0].Subnet {
		t.Errorf("id %s and subnet %s, want %s and %s as before", h.id(), after.Overlays[0].Subnet, id, before.Overlays[0].Subnet)
	}
	eventually(t, "VTEP follows", func() error {
		if local := vtepLocal(t); local != "172.17.0.8" {
			return fmt.Errorf("the VTEP sends from %s", local)
		}
		return nil
	})
}

// routeFrom sets the source address towards the coordinator.
func routeFrom(t *testing.T, src string) {
	t.Helper()
	u0, err := netlink.LinkByName("u0")
	must(t, err)
	_, dst, err := net.ParseCIDR("172.17.0.0/24")
	must(t, err)
	must(t, netlink.RouteReplace(&netlink.Route{
		LinkIndex: u0.Attrs().Index, Dst: dst, Src: net.ParseIP(src), Scope: unix.RT_SCOPE_LINK, Protocol: unix.RTPROT_KERNEL,
	}))
}

func vtepLocal(t *testing.T) string {
	t.Helper()
	l, err := netlink.LinkByName(conf.VTEPName)
	must(t, err)
	return l.(*netlink.Vxlan).SrcAddr.String()
}

func agentAt(c *cluster, id, ip string) error {
	agents, err := c.client().Agents(c.t.Context())
	if err != nil {
		return err
	}
	for _, a := range agents {
		if a.AgentID == id && a.AgentIP == addr(ip) {
			return nil
		}
	}
	return fmt.Errorf("agents are %v", agents)
}

// A host with a copy of our agent id that registers after us and before we
// follow the peers is noticed at once, and when it has gone, the lease is ours.
func TestCopiedIdentity(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.opts.ID = "copied"
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	left := make(chan struct{})
	var came atomic.Bool
	c.beforeWatch = func() {
		if came.Swap(true) {
			return
		}
		c.join("copied", "172.17.0.9")
		following := make(chan struct{}, 1000)
		go func() {
			defer close(left)
			c.client().Watch(ctx, "copied", api.Known{}, func(api.PeerEvent) error {
				following <- struct{}{}
				return nil
			})
		}()
		<-following
	}
	h.start()
	h.published("the conflict", func(s conf.State) bool {
		return strings.Contains(s.Lease.Error, "agent id copied is in use by the host at 172.17.0.9")
	})
	leave()
	<-left
	eventually(t, "the agent has its lease back", func() error { return agentAt(c, "copied", "172.17.0.4") })
	h.published("it is told of", func(s conf.State) bool { return s.Lease.Error == "" })
	c.join("peer", "172.17.0.5")
	eventually(t, "peers are followed again", func() error { return hasRoute(prefix("9.0.1.0/24")) })
}

// The coordinator's store is put back as it was before while the agent is away,
// and has come as far again: what the agent remembers is of another history.
func TestRestoredStore(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	peers := func(want ...string) func() error {
		return func() error {
			var s savedPeers
			if err := conf.ReadJSON(h.stored(peersFile), &s); err != nil {
				return err
			}
			var ids []string
			for _, p := range s.Peers {
				ids = append(ids, p.AgentID)
			}
			if !slices.Equal(ids, want) {
				return fmt.Errorf("peers %v of revision %d, want %v", ids, s.Revision, want)
			}
			return nil
		}
	}
	h.start()
	h.ready()
	h.statusAt("it is told that all is well", allOK)
	db := filepath.Join(c.dir, "coordinator.db")
	c.stop()
	before, err := os.ReadFile(db)
	must(t, err)
	c.start()
	c.join("lost", "172.17.0.5")
	eventually(t, "the host that is forgotten is a peer", peers("lost"))
	h.stop()
	c.stop()
	must(t, os.WriteFile(db, before, 0o600))
	c.start()
	c.join("b", "172.17.0.6")
	c.join("c", "172.17.0.7")
	h.start()
	eventually(t, "the peers are those that there are now", peers("b", "c"))
}

// A deleted agent registers anew and lives with what it gets.
func TestDeletedAgent(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("first", "172.17.0.3")
	h := newHost(c)
	h.start()
	h.ready()
	if got := h.document().Overlays[0].Subnet; got != prefix("9.0.1.0/24") {
		t.Fatalf("subnet %s, want the second", got)
	}
	_, err := c.client().Delete(t.Context(), []string{"first", h.id()})
	must(t, err)
	h.published("the new lease", func(s conf.State) bool {
		return len(s.Overlays) == 2 && s.Overlays[0].Subnet == prefix("9.0.0.0/24") && s.Overlays[0].State.Status == conf.StatusOK
	})
	eventually(t, "bridge has the new address", func() error { return hasAddr("m-dcos", "9.0.0.1/25") })
	if err := hasAddr("m-dcos", "9.0.1.1/25"); err == nil {
		t.Error("the bridge has the old address still")
	}
	h.statusAt("status after the deletion", allOK)
}

// A subnet that somebody else has been granted since is not given out, and a
// coordinator that knows better is believed.
func TestLostLease(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	c.stop()
	h.stop()
	var l savedLease
	must(t, conf.ReadJSON(h.stored(leaseFile), &l))
	must(t, conf.WriteJSON(h.stored(peersFile), savedPeers{
		AgentID: l.Lease.AgentID, ClusterID: l.Lease.ClusterID,
		Peers: []conf.Peer{testPeer("thief", 9, 1000, "9.0.0.0/24", "9.0.7.0/24")},
	}, 0o600))

	h.start()
	s := h.published("the loss", func(s conf.State) bool { return s.Lease.Lost != "" })
	if !strings.Contains(s.Lease.Lost, "9.0.0.0/24 is leased to agent thief") {
		t.Errorf("lost: %s", s.Lease.Lost)
	}
	h.notReady("thief")
	if err := errors.Join(hasAddr("d-dcos", "9.0.0.129/25"), hasRoute(prefix("9.0.7.0/24"))); err != nil {
		t.Errorf("the datapath must stay: %v", err)
	}
	if hasRoute(prefix("9.0.0.0/24")) == nil {
		t.Error("our own containers are sent to the other host")
	}
	c.start()
	h.ready()
	h.published("nothing is lost", func(s conf.State) bool { return s.Lease.Lost == "" })
}

// Overlays come and go with the coordinator's configuration, and so do bridges
// and files.
func TestOverlaysComeAndGo(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()

	c.stop()
	c.Network.Overlays = append(c.Network.Overlays, conf.Overlay{Name: "extra", Subnet: prefix("10.5.0.0/16"), Prefix: 26})
	c.start()
	h.published("the new overlay", func(s conf.State) bool {
		o, ok := s.Overlay("extra")
		return ok && o.State.Status == conf.StatusOK
	})
	files := []string{filepath.Join(h.opts.CNIConfDir, "87-extra.conflist"), filepath.Join(h.opts.UCRConfDir, "extra.conf")}
	eventually(t, "bridge and files of the new overlay", func() error {
		return errors.Join(hasAddr("d-extra", "10.5.0.33/27"), exists(files[0], true), exists(files[1], true))
	})
	h.statusAt("status of the new overlay", func(s map[string]conf.OverlayStatus) bool { return s["extra"].Status == conf.StatusOK })

	c.stop()
	c.Network.Overlays = c.Network.Overlays[:2]
	c.start()
	h.published("the overlay is gone", func(s conf.State) bool { _, ok := s.Overlay("extra"); return !ok })
	eventually(t, "bridges and files are gone", func() error {
		return errors.Join(noLink("d-extra"), noLink("m-extra"), exists(files[0], false), exists(files[1], false))
	})
	if err := hasAddr("d-dcos", "9.0.0.129/25"); err != nil {
		t.Errorf("the other overlay: %v", err)
	}
	if !strings.Contains(h.log.String(), "overlay is no longer served") {
		t.Error("nothing was logged")
	}
}

// An exhausted pool fails its overlay by name, and no other.
func TestExhaustedOverlay(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	network := seedNetwork()
	network.Overlays = append(network.Overlays, conf.Overlay{Name: "tiny", Subnet: prefix("10.6.0.0/24"), Prefix: 24})
	c := newCluster(t, network)
	c.join("first", "172.17.0.3")
	h := newHost(c)
	h.start()
	h.ready()
	s := h.document()
	tiny, _ := s.Overlay("tiny")
	if tiny.State == nil || tiny.State.Status != conf.StatusFailed || !strings.Contains(tiny.State.Error, "10.6.0.0/24") {
		t.Errorf("state of the exhausted overlay: %+v, want %s and the pool's name", tiny.State, conf.StatusFailed)
	}
	if tiny.DockerBridge != nil || tiny.MesosBridge != nil || tiny.Subnet.IsValid() {
		t.Errorf("the exhausted overlay has something: %+v", tiny)
	}
	if o, _ := s.Overlay("dcos"); o.State.Status != conf.StatusOK {
		t.Errorf("the other overlay: %+v", o.State)
	}
	if err := errors.Join(noLink("d-tiny"), exists(filepath.Join(h.opts.CNIConfDir, "87-tiny.conflist"), false)); err != nil {
		t.Error(err)
	}
	h.statusAt("status at the coordinator", func(s map[string]conf.OverlayStatus) bool {
		return s["tiny"].Status == conf.StatusFailed && strings.Contains(s["tiny"].Error, "10.6.0.0/24") && s["dcos"].Status == conf.StatusOK
	})
	// It asks again, and gets it when there is one.
	_, err := c.client().Delete(t.Context(), []string{"first"})
	must(t, err)
	h.restart()
	h.published("the overlay works", func(s conf.State) bool {
		o, _ := s.Overlay("tiny")
		return o.State != nil && o.State.Status == conf.StatusOK
	})
}

// No lease at all: the reason is to be seen, and nothing is promised.
func TestNoLease(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	network := seedNetwork()
	network.VTEPSubnet, network.VTEPSubnet6 = prefix("44.128.0.0/30"), netip.Prefix{}
	network.Overlays = network.Overlays[:1]
	c := newCluster(t, network)
	c.join("a", "172.17.0.2")
	c.join("b", "172.17.0.3")
	h := newHost(c)
	h.start()
	h.notReady("44.128.0.0/30")
	_, body, err := h.get(api.PathAgentOverlay)
	must(t, err)
	var s conf.State
	must(t, json.Unmarshal([]byte(body), &s))
	if s.Lease.Lost == "" || !strings.Contains(s.Lease.Error, "44.128.0.0/30") || s.Overlays != nil {
		t.Errorf("document without a lease: %s", body)
	}
	if err := errors.Join(exists(h.path(conf.StateFile), false), noLink(conf.VTEPName)); err != nil {
		t.Error(err)
	}
	// Several tries later it was logged once.
	wait(t, time.Second)
	if n := strings.Count(h.log.String(), "registration failed"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, h.log)
	}
	_, err = c.client().Delete(t.Context(), []string{"a"})
	must(t, err)
	h.ready()
}

// A host without bridges leases and forwards.
func TestNoBridges(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("peer", "172.17.0.3")
	h := newHost(c)
	h.opts.Bridges = nil
	h.start()
	h.ready()
	for _, o := range h.document().Overlays {
		if o.DockerBridge != nil || o.MesosBridge != nil || !o.Subnet.IsValid() && !o.Subnet6.IsValid() {
			t.Errorf("overlay %+v, want a subnet and no bridges", o)
		}
	}
	eventually(t, "peer", func() error { return hasRoute(prefix("9.0.0.0/24")) })
	if err := errors.Join(noLink("m-dcos"), noLink("d-dcos"), exists(filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist"), false)); err != nil {
		t.Error(err)
	}

	// Bridges are wanted later: the agent's own word counts even while the
	// coordinator cannot be asked.
	h.stop()
	c.stop()
	h.opts.Bridges = []conf.Half{conf.Docker}
	h.start()
	h.ready()
	eventually(t, "bridge and file of one half", func() error {
		return errors.Join(hasAddr("d-dcos", "9.0.1.129/25"), noLink("m-dcos"), exists(filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist"), true))
	})
}

// Renewals write only when the end of the lease has moved far enough, and a
// lease that ends is not used any longer.
func TestTerm(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.stop()
	c.Term = 6 * time.Second // so it is renewed every 2 s and ends 5.4 s after that
	c.start()
	h := newHost(c)
	h.start()
	h.ready()
	first := h.document()
	h.published("a renewal moves the end", func(s conf.State) bool { return s.Lease.ExpiresBoottime > first.Lease.ExpiresBoottime })
	c.stop()
	h.notReady("renewed in time")
	s := h.document()
	if now := int64(ipam.Boottime()); s.Lease.ExpiresBoottime > now {
		t.Errorf("the document promises addresses until %d, it is %d", s.Lease.ExpiresBoottime, now)
	}
	if err := hasAddr("d-dcos", "9.0.0.129/25"); err != nil {
		t.Errorf("the datapath must stay: %v", err)
	}
	// A restart must not bring it back to life.
	h.restart()
	h.notReady("renewed in time")
	c.start()
	h.ready()
}

// Many renewals of a long lease write no file.
func TestRenewalsWriteNothing(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.renew = 50 * time.Millisecond
	h.start()
	h.ready()
	h.statusAt("status", allOK)
	inodes := func() (out []uint64) {
		for _, path := range []string{h.path(conf.StateFile), h.stored(leaseFile), h.stored(idFile), filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist")} {
			var st unix.Stat_t
			must(t, unix.Stat(path, &st))
			out = append(out, st.Ino)
		}
		return out
	}
	before := inodes()
	for range 2 { // a restart is one more
		start := c.registrations.Load()
		eventually(t, "renewals", func() error {
			if n := c.registrations.Load() - start; n < 5 {
				return fmt.Errorf("%d renewals", n)
			}
			return nil
		})
		h.restart()
		h.ready()
	}
	if after := inodes(); !slices.Equal(before, after) {
		t.Errorf("inodes %v became %v: files were written although nothing changed", before, after)
	}
}

// What others break in the kernel is repaired at once.
func TestRepair(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("peer", "172.17.0.3")
	h := newHost(c)
	h.start()
	h.ready()
	eventually(t, "peer", func() error { return hasRoute(prefix("9.0.0.0/24")) })
	for _, name := range []string{"d-dcos", conf.VTEPName} {
		l, err := netlink.LinkByName(name)
		must(t, err)
		must(t, netlink.LinkDel(l))
		eventually(t, name+" is back", func() error {
			return errors.Join(hasAddr("d-dcos", "9.0.1.129/25"), hasRoute(prefix("9.0.0.0/24")))
		})
	}
	eventually(t, "it is logged", func() error {
		if !strings.Contains(h.log.String(), "kernel state repaired") {
			return errors.New("not yet")
		}
		return nil
	})

	// So is the document, at the next look.
	must(t, os.Remove(h.path(conf.StateFile)))
	d, err := netlink.LinkByName("d-dcos")
	must(t, err)
	must(t, netlink.LinkDel(d))
	h.published("the document is back", func(s conf.State) bool { return len(s.Overlays) == 2 })
	h.ready()
}

// The sockets: a stale one is replaced, another file is not; an address in use
// is a start-up error.
func TestSockets(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	must(t, os.Mkdir(h.opts.RunDir, 0o755))
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: h.path(conf.SocketFile), Net: "unix"})
	must(t, err)
	stale.SetUnlinkOnClose(false)
	stale.Close()
	h.opts.Listen = "127.0.0.1:6441"
	h.start()
	h.ready()
	fi, err := os.Stat(h.path(conf.SocketFile))
	if err != nil || fi.Mode().Perm() != 0o660 {
		t.Errorf("socket: %v %v, want mode 0660", fi.Mode(), err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://127.0.0.1:6441" + api.PathAgentOverlay)
	if err != nil || resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("over TCP: %v %v", resp, err)
	}
	resp.Body.Close()
	for _, tt := range []struct {
		method, path string
		code         int
		says         string
	}{
		{"POST", api.PathAgentOverlay, http.StatusMethodNotAllowed, "POST /overlay-agent/overlay: only GET is served here"},
		{"GET", "/overlay-master/state", http.StatusNotFound, "this is the agent"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tt.method, "http://127.0.0.1:6441"+tt.path, nil)
		must(t, err)
		resp, err := client.Do(req)
		must(t, err)
		var answer api.Error
		err = json.NewDecoder(resp.Body).Decode(&answer)
		resp.Body.Close()
		if err != nil || resp.StatusCode != tt.code || !strings.Contains(answer.Message, tt.says) {
			t.Errorf("%s %s: %d %v %q, want %d and %q", tt.method, tt.path, resp.StatusCode, err, answer.Message, tt.code, tt.says)
		}
		if allow := resp.Header.Get("Allow"); (allow == "GET") != (tt.code == http.StatusMethodNotAllowed) {
			t.Errorf("%s %s: Allow %q", tt.method, tt.path, allow)
		}
	}

	other := newHost(c)
	other.opts.Listen = "127.0.0.1:6441"
	mustNotStart(t, other.opts, "address already in use")
	other.opts.Listen = ""
	must(t, os.WriteFile(other.path(conf.SocketFile), []byte("precious"), 0o600))
	mustNotStart(t, other.opts, "is not a socket; move it away")
	if b, err := os.ReadFile(other.path(conf.SocketFile)); err != nil || string(b) != "precious" {
		t.Errorf("the file is %q now, %v", b, err)
	}
	other.opts.RunDir = h.opts.RunDir
	mustNotStart(t, other.opts, "another agent (process")
}

func mustNotStart(t *testing.T, o Options, want string) {
	t.Helper()
	a, err := New(o)
	must(t, err)
	if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Run: %v, want an error with %q", err, want)
	}
}

func TestAgentIP(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	newRemote(t)
	refuseNames(t)
	for _, tc := range []struct {
		name string
		urls []string
		want string // part of the error if it is not an address
	}{
		{"towards the coordinator", []string{"http://172.17.0.1:6440"}, "172.17.0.2"},
		{"the second coordinator", []string{"http://no-such-host.invalid:6440", "http://172.17.0.1:6440"}, "172.17.0.2"},
		{"no route", []string{"http://10.99.0.1:6440"}, "no usable source address"},
		{"coordinator here, no default route", []string{"http://127.0.0.1:6440"}, "--agent-ip"},
	} {
		ip, err := agentIP(t.Context(), tc.urls)
		if err != nil && !strings.Contains(err.Error(), tc.want) || err == nil && ip.String() != tc.want {
			t.Errorf("%s: %s, %v; want %s", tc.name, ip, err, tc.want)
		}
	}

	must(t, netlink.RouteAdd(&netlink.Route{Gw: net.IPv4(172, 17, 0, 1), Src: net.IPv4(172, 17, 0, 9)}))
	if ip, err := agentIP(t.Context(), []string{"http://localhost:6440"}); err != nil || ip != addr("172.17.0.9") {
		t.Errorf("coordinator here: %s, %v; want the default route's source", ip, err)
	}
	// Not while a name cannot be resolved: on a host with two networks the
	// default route would name the wrong one.
	if ip, err := agentIP(t.Context(), []string{"http://no-such-host.invalid:6440"}); err == nil {
		t.Errorf("name that cannot be resolved: %s, want an error", ip)
	}
}

// refuseNames makes every name server answer at once that it is none: its
// address is this host's.
func refuseNames(t *testing.T) {
	t.Helper()
	b, err := os.ReadFile("/etc/resolv.conf")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		words := strings.Fields(line)
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		ip, err := netip.ParseAddr(words[1])
		must(t, err)
		if !ip.IsLoopback() {
			addAddr(t, "lo", netip.PrefixFrom(ip, ip.BitLen()).String())
		}
	}
}

// What cannot be published is not offered to the runtimes either, and is
// published soon after it can be: as when the run directory was full.
func TestPublishingFails(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	inTheWay := filepath.Join(h.path(conf.StateFile), "directory")
	must(t, os.MkdirAll(inTheWay, 0o755))
	h.start()
	h.notReady("the state cannot be published")
	list := filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist")
	must(t, exists(list, false))

	must(t, os.RemoveAll(filepath.Dir(inTheWay)))
	before := time.Now()
	h.ready()
	must(t, exists(list, true))
	if took := time.Since(before); took > 10*time.Second {
		t.Errorf("published %s after it could be; want the time of a retry", took)
	}
}
