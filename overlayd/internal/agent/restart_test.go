package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

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
	after := h.published("the outage is published", func(s conf.State) bool { return s.Lease.Error != "" })
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

// What the release before did not know of a peer it has not stored, though it had
// heard of it; the agent that comes after it learns it all the same.
func TestPeersOfAnotherRelease(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	_, err := c.client().Register(t.Context(), api.RegisterRequest{
		AgentID: "peer", AgentIP: addr("172.17.0.3"), Version: "test",
		Underlay: conf.Underlay{MTU: 1300, TwoFamilies: true},
	})
	must(t, err)
	subnet, err := netlink.ParseIPNet("9.0.1.0/24")
	must(t, err)
	small := func() error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: subnet}, netlink.RT_FILTER_DST)
		if err != nil {
			return err
		}
		if len(routes) != 1 || routes[0].MTU != 1300 {
			return fmt.Errorf("routes %v, want one with the peer's MTU", routes)
		}
		return nil
	}
	eventually(t, "route to the peer", small)
	h.stop()

	type peer struct { // as the build of 2026-11-23 has it
		ID      string   `json:"id"`
		IP      string   `json:"ip"`
		Epoch   uint64   `json:"epoch"`
		VTEPIP  string   `json:"vtep_ip"`
		VTEPIP6 string   `json:"vtep_ip6,omitempty"`
		VTEPMAC string   `json:"vtep_mac"`
		Subnets []string `json:"subnets,omitempty"`
	}
	var before struct {
		AgentID   string `json:"agent_id"`
		ClusterID string `json:"cluster_id"`
		Revision  uint64 `json:"revision"`
		Run       string `json:"run,omitempty"`
		Peers     []peer `json:"peers"`
	}
	must(t, conf.ReadJSON(h.stored(peersFile), &before))
	if len(before.Peers) != 1 || before.Revision == 0 || before.Run == "" {
		t.Fatalf("stored: %+v", before)
	}
	must(t, conf.WriteJSON(h.stored(peersFile), before, 0o600))
	h.start()
	h.ready()
	eventually(t, "route to the peer, after the upgrade", small)
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
		left := time.Duration(h.document().Lease.ExpiresBoottime) - conf.Boottime()
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

	// Files that cannot be written are reported, and everything else works.
	h.stop()
	for _, path := range []string{h.stored(leaseFile), h.stored(peersFile)} {
		must(t, os.Remove(path))
		must(t, os.Mkdir(path, 0o700))
	}
	h.start()
	h.ready()
	eventually(t, "peer", func() error { return hasRoute(prefix("9.0.0.0/24")) })
	eventually(t, "it is logged", func() error {
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

// A coordinator that comes back, with the same store, gets status and requests again.
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
	h.statusAt("the coordinator has the status", allOK)
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
