package coordinator_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/transfer"
)

// fourNetwork has four subnets.
const fourNetwork = `{"vtep_subnet": "44.128.0.0/20", "vtep_mac_oui": "70:B3:D5:00:00:00",
	"overlays": [{"name": "dcos", "subnet": "9.0.0.0/22", "prefix": 24}]}`

// fourSubnets is a bubble with four subnets and terms of ten minutes.
func fourSubnets(t *testing.T, more string) *bubble {
	t.Helper()
	return bubbleOf(t, coordinator.Options{Store: newStore(t), Term: 10 * time.Minute}, `{"vtep_subnet": "44.128.0.0/20", "vtep_mac_oui": "70:B3:D5:00:00:00",
		"overlays": [{"name": "dcos", "subnet": "9.0.0.0/22", "prefix": 24}]`+more+"}")
}

// leased registers agents, each of which was connected for a moment, a minute
// after the other, and returns their subnets.
func leased(b *bubble, ids ...string) map[string]string {
	b.t.Helper()
	subnets := map[string]string{}
	for i, id := range ids {
		subnets[id] = b.register(id, fmt.Sprintf("10.0.0.%d", i+1)).Grants[0].Subnet.String()
		_, disconnect := b.connect(id)
		disconnect()
		time.Sleep(time.Minute)
	}
	return subnets
}

// Expired leases go to others when nothing fresh is left, oldest first, after a
// grace; and never those of agents that are there, or came back.
func TestReclaim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := fourSubnets(t, "")
		subnets := leased(b, "first", "second", "back", "here")
		_, disconnect := b.connect("here")
		defer disconnect()
		wants := func(id, ip, from string) {
			t.Helper()
			want, g := "invalid Prefix", b.register(id, ip).Grants[0]
			if from != "" {
				want = subnets[from]
			}
			if g.Subnet.String() != want {
				t.Errorf("%s got %s (%s), want %s", id, g.Subnet, g.Error, want)
			}
		}
		time.Sleep(20 * time.Minute) // terms are over, and the grace is not
		wants("new1", "10.0.1.1", "")
		time.Sleep(20 * time.Minute)
		wants("back", "10.0.0.3", "back")
		wants("new1", "10.0.1.1", "first")
		wants("new2", "10.0.1.2", "second")
		wants("new3", "10.0.1.3", "")
	})
}

func TestReclaimNever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := fourSubnets(t, `, "reclaim": "never"`)
		leased(b, "a", "b", "c", "d")
		time.Sleep(time.Hour)
		if g := b.register("new", "10.0.1.1").Grants[0]; g.Subnet.IsValid() {
			t.Errorf("got %s of an agent that may come back", g.Subnet)
		}
	})
}

// An agent that renews and does not follow its peers is alive, also for the coordinator
// that comes next, and for another one.
func TestRenewingIsAlive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := coordinator.Options{Store: newStore(t), Term: 10 * time.Minute}
		const network = `{"vtep_subnet": "44.128.0.0/20", "vtep_mac_oui": "70:B3:D5:00:00:00",
			"overlays": [{"name": "dcos", "subnet": "9.0.0.0/22", "prefix": 24}]}`
		b := bubbleOf(t, o, network)
		subnets := leased(b, "renews", "gone", "gone2", "gone3")
		for range 25 {
			b.register("renews", "10.0.0.1")
			time.Sleep(2 * time.Minute)
		}
		b.stop()
		b = bubbleOf(t, o, network)
		for i := range 4 { // one more than are gone
			b.register(fmt.Sprint("new", i), fmt.Sprint("10.0.1.", i+1))
		}
		if g := b.register("renews", "10.0.0.1").Grants[0]; g.Subnet.String() != subnets["renews"] {
			t.Errorf("got %s (%s), had %s", g.Subnet, g.Error, subnets["renews"])
		}
	})
}

// The wall clock was ahead when an agent went. What it has done since counts all the
// same, also for the coordinator that comes next.
func TestRenewingIsAliveAfterClockJump(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(t)
		o := coordinator.Options{Store: s, Term: 10 * time.Minute}
		b := bubbleOf(t, o, fourNetwork)
		subnets := leased(b, "renews", "gone", "gone2", "gone3")
		time.Sleep(10 * time.Minute) // until it is written that they have gone
		ahead(t, s, "seen/renews")
		for range 25 {
			b.register("renews", "10.0.0.1")
			time.Sleep(2 * time.Minute)
		}
		b.stop()
		b = bubbleOf(t, o, fourNetwork)
		for i := range 4 { // one more than are gone
			b.register(fmt.Sprint("new", i), fmt.Sprint("10.0.1.", i+1))
		}
		if g := b.register("renews", "10.0.0.1").Grants[0]; g.Subnet.String() != subnets["renews"] {
			t.Errorf("got %s (%s), had %s", g.Subnet, g.Error, subnets["renews"])
		}
	})
}

// ahead has a stored time be of a clock that was a year ahead.
func ahead(t *testing.T, s store.Store, key string) {
	t.Helper()
	kvs, _, err := s.List(t.Context(), key)
	if err != nil || len(kvs) != 1 {
		t.Fatalf("%s: %v, %v", key, kvs, err)
	}
	var seen map[string]int64
	if err := json.Unmarshal(kvs[0].Value, &seen); err != nil || seen["at"] == 0 {
		t.Fatalf("%s: %v", kvs[0].Value, err)
	}
	seen["at"] += 365 * 24 * 3600
	value, err := json.Marshal(seen)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(t.Context(), store.Txn{Then: []store.Op{{Key: key, Value: value}}}); err != nil {
		t.Fatal(err)
	}
}

// Leases of hosts that are gone go to others also when the store was copied, or put
// back from a backup that was made while they were connected, and not before the grace
// is over.
func TestReclaimAfterTransfer(t *testing.T) {
	for _, how := range []string{"copy", "restore"} {
		for _, shared := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,shared=%t", how, shared), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { reclaimAfter(t, how, shared) })
			})
		}
	}
}

func reclaimAfter(t *testing.T, how string, shared bool) {
	from, to := newStore(t), newStore(t)
	o := coordinator.Options{Store: from, Term: 10 * time.Minute, Shared: shared}
	b := bubbleOf(t, o, fourNetwork)
	time.Sleep(5 * time.Hour)
	leased(b, "gone", "gone2", "there", "there2")
	_, disconnect := b.connect("there")
	_, disconnect2 := b.connect("there2")
	time.Sleep(10 * time.Minute)
	content, err := transfer.Read(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	disconnect()
	disconnect2()
	b.stop()
	move := content.Copy
	if how == "restore" {
		move = content.Restore
	}
	if err := move(t.Context(), to, time.Now()); err != nil {
		t.Fatal(err)
	}
	o.Store = to
	b = bubbleOf(t, o, fourNetwork)
	if how == "restore" {
		time.Sleep(9 * time.Minute)
		_, err := b.Register(t.Context(), request("new0", "10.0.1.1"))
		refused(t, err, http.StatusServiceUnavailable, "the coordinator's store lacks leases")
	}
	time.Sleep(5 * time.Minute)
	g := b.register("new0", "10.0.1.1").Grants[0]
	if g.Subnet.IsValid() {
		t.Errorf("got %s of an agent that may come back", g.Subnet)
	}
	time.Sleep(50 * time.Minute)
	for i := range 4 {
		if g := b.register(fmt.Sprint("new", i), fmt.Sprint("10.0.1.", i+1)).Grants[0]; !g.Subnet.IsValid() {
			t.Errorf("new%d got nothing: %s", i, g.Error)
		}
	}
}

// The file is put back as it was when an agent had been gone for long. It came back
// since, and may be cut off at present: its subnet goes to nobody before its grace is over.
func TestReclaimAfterOlderFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "coordinator.db")
		witness, err := coordinator.OpenWitness(filepath.Join(t.TempDir(), "store-epoch"), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		defer witness.Close()
		s := openStore(t, path)
		o := coordinator.Options{Store: s, Term: 10 * time.Minute, Adopt: coordinator.Adopt{Witness: witness}}
		b := bubbleOf(t, o, fourNetwork)
		leased(b, "back", "b", "c", "d")
		time.Sleep(5 * time.Hour)
		b.stop()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		older, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}

		s = openStore(t, path)
		o.Store = s
		b = bubbleOf(t, o, fourNetwork)
		b.register("back", "10.0.0.1")
		_, disconnect := b.connect("back")
		time.Sleep(20 * time.Minute)
		disconnect()
		b.stop()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}

		if err := os.WriteFile(path, older, 0o600); err != nil {
			t.Fatal(err)
		}
		o.Store = openStore(t, path)
		b = bubbleOf(t, o, fourNetwork)
		time.Sleep(15 * time.Minute) // adoption is over
		if g := b.register("new", "10.0.1.1").Grants[0]; g.Subnet.IsValid() {
			t.Errorf("got %s of an agent that may come back", g.Subnet)
		}
		time.Sleep(20 * time.Minute)
		if g := b.register("new", "10.0.1.1").Grants[0]; !g.Subnet.IsValid() {
			t.Errorf("got nothing: %s", g.Error)
		}
	})
}
