package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

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
	h.notReady("agent id copied is in use")
	if lost := h.document().Lease.Lost; !strings.Contains(lost, "172.17.0.9") {
		t.Errorf("the plugins may attach: lost is %q", lost)
	}
	leave()
	<-left
	h.ready()
	eventually(t, "the agent has its lease back", func() error { return agentAt(c, "copied", "172.17.0.4") })
	h.published("the error has gone", func(s conf.State) bool { return s.Lease.Error == "" })
	c.join("peer", "172.17.0.5")
	eventually(t, "peers are followed again", func() error { return hasRoute(prefix("9.0.1.0/24")) })
}

// That another host has our identity is true until a coordinator accepts us: one that
// does not answer, or cannot at present, knows nothing about it.
func TestConflictLasts(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.opts.ID = "copied"
	h.renew = 50 * time.Millisecond
	h.start()
	h.ready()
	answer := func(code int, kind, message string) func() {
		var asked atomic.Int64
		c.answer = func(w http.ResponseWriter) {
			asked.Add(1)
			w.WriteHeader(code)
			json.NewEncoder(w).Encode(api.Error{Kind: kind, Message: message})
		}
		c.stop()
		c.start()
		return func() {
			t.Helper()
			before := asked.Load()
			eventually(t, "the agent has asked several times", func() error {
				if n := asked.Load() - before; n < 3 {
					return fmt.Errorf("%d times", n)
				}
				return nil
			})
		}
	}
	const inUse = "POST /v1/register: another host has it"
	lost := func() string { return h.document().Lease.Lost }
	answer(http.StatusConflict, api.KindIDInUse, "another host has it")()
	h.published("the conflict", func(s conf.State) bool { return s.Lease.Lost == inUse })
	for _, code := range []int{http.StatusServiceUnavailable, http.StatusInsufficientStorage, http.StatusForbidden} {
		answer(code, "", fmt.Sprint("code ", code))()
		if why := lost(); why != inUse {
			t.Errorf("after code %d lost is %q", code, why)
		}
	}
	c.answer = nil
	c.stop()
	h.published("the coordinator is away", func(s conf.State) bool {
		return strings.Contains(s.Lease.Error, "connection refused") && s.Lease.Lost == inUse
	})
	c.start()
	h.ready()
	h.published("it is over", func(s conf.State) bool { return s.Lease.Lost == "" })
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
	// What goes there goes to who has it now; the other overlay stays.
	if err := errors.Join(hasRoute(prefix("9.0.0.0/24")), hasRoute(prefix("9.0.7.0/24")), hasAddr("d-dcos6", "fd01:b::8000:0:1/81")); err != nil {
		t.Errorf("the datapath: %v", err)
	}
	c.start()
	h.ready()
	if err := hasAddr("d-dcos", "9.0.0.129/25"); err != nil {
		t.Errorf("the subnet is ours: %v", err)
	}
	h.published("nothing is lost", func(s conf.State) bool { return s.Lease.Lost == "" })
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
	if now := int64(conf.Boottime()); s.Lease.ExpiresBoottime > now {
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
