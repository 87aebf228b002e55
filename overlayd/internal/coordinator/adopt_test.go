package coordinator_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
	"overlayd.internal/overlay/overlayd/internal/store/transfer"
)

// shows is the registration of an agent that shows the lease it holds.
func shows(l conf.Lease) api.RegisterRequest {
	return api.RegisterRequest{AgentID: l.AgentID, AgentIP: l.AgentIP, Version: "1.0", ClusterID: l.ClusterID, Presented: l.Signed}
}

func (b *bubble) show(l conf.Lease) conf.Lease {
	b.t.Helper()
	got, err := b.Register(b.t.Context(), shows(l))
	if err != nil {
		b.t.Fatal(err)
	}
	return got
}

// waits checks that an agent gets nothing fresh at present.
func (b *bubble) waits(req api.RegisterRequest, words ...string) {
	b.t.Helper()
	_, err := b.Register(b.t.Context(), req)
	refused(b.t, err, http.StatusServiceUnavailable, append(words, "lacks leases", " UTC")...)
}

// blocks is what a lease grants, as text.
func blocks(l conf.Lease) string {
	out := []string{l.VTEP.IP.Addr().String(), l.VTEP.IP6.Addr().String()}
	for _, g := range l.Grants {
		out = append(out, fmt.Sprintf("%s %s %s %v", g.Overlay.Name, g.Subnet, g.Subnet6, g.Blocks))
	}
	return strings.Join(out, ", ")
}

func kept(t testing.TB, before, after conf.Lease) {
	t.Helper()
	if blocks(before) != blocks(after) || after.Epoch <= before.Epoch {
		t.Errorf("agent %s has %s with epoch %d, and had %s with %d", after.AgentID, blocks(after), after.Epoch, blocks(before), before.Epoch)
	}
}

// A store is lost, and an empty one takes its place on purpose. Who shows a lease
// gets it back with a higher epoch, in whatever order they come; who is new gets
// nothing for ten minutes, also when the coordinator starts again in between.
func TestAdoptAfterLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		var leases []conf.Lease
		for i := range 5 {
			leases = append(leases, b.register(fmt.Sprint("agent-", i), fmt.Sprint("10.0.0.", i+1)))
		}

		s := newStore(t)
		b = b.loses(s)
		if b.ClusterID() != leases[0].ClusterID {
			t.Fatalf("cluster %s, want %s", b.ClusterID(), leases[0].ClusterID)
		}
		b.waits(request("new", "10.0.0.9"), "shows none")
		for _, i := range []int{3, 0, 4} {
			got := b.show(leases[i])
			kept(t, leases[i], got)
			again := b.show(got)
			sameLease(t, "renewed", got, again)
		}
		time.Sleep(9 * time.Minute)
		b.stop()
		b = bubbleWith(t, coordinator.Options{Store: s}) // no word of an adoption
		b.waits(request("new", "10.0.0.9"))
		kept(t, leases[1], b.show(leases[1]))
		time.Sleep(11 * time.Minute)
		fresh := b.register("new", "10.0.0.9")
		if fresh.VTEP.IP == leases[0].VTEP.IP {
			t.Errorf("VTEP %s is another's", fresh.VTEP.IP)
		}
		// The last one was away for longer, and the newcomer got what it had.
		late := b.show(leases[2])
		claims(t, []conf.Lease{fresh, late})
	})
}

// Two agents show leases of the same: the one that was granted later has it,
// whoever comes first; the other is told, and gets something else in the end.
func TestContradictoryLeases(t *testing.T) {
	for _, laterFirst := range []bool{false, true} {
		t.Run(fmt.Sprint("later first ", laterFirst), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := inBubble(t, newStore(t))
				earlier := b.register("earlier", "10.0.0.1")
				if _, err := b.Delete(t.Context(), []string{"earlier"}); err != nil {
					t.Fatal(err)
				}
				later := b.register("later", "10.0.0.2")
				if blocks(earlier) != blocks(later) {
					t.Fatalf("%s and %s, want the same", blocks(earlier), blocks(later))
				}
				b = b.loses(newStore(t))
				if laterFirst {
					kept(t, later, b.show(later))
				} else {
					kept(t, earlier, b.show(earlier))
					kept(t, later, b.show(later))
				}
				b.waits(shows(earlier), "was granted to agent later (10.0.0.2)")
				time.Sleep(11 * time.Minute)
				now := b.show(later)
				kept(t, later, now)
				claims(t, []conf.Lease{now, b.show(earlier)})
			})
		})
	}
}

// Who lost what it holds to a later claim goes on showing its last lease, which was
// signed after the loss. That takes nothing from the winner, and proves no loss; and
// it counts for no more than it did when the store is lost once more.
func TestLoserShowsItsLastLease(t *testing.T) {
	for _, when := range []string{"at once", "when the time is over", "later comes when the time is over", "after another loss"} {
		t.Run(when, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b, earlier, later := contested(t)
				got := b.show(earlier)
				kept(t, earlier, got)
				switch when {
				case "after another loss":
					b = b.loses(newStore(t))
					got = b.show(got)
				case "later comes when the time is over":
					time.Sleep(11 * time.Minute)
				}
				won := b.show(later)
				kept(t, later, won)
				if when == "when the time is over" {
					time.Sleep(11 * time.Minute)
				}
				for range 3 {
					if when != "when the time is over" {
						b.waits(shows(got), "was granted to agent later")
					}
					sameLease(t, "the winner's", won, b.show(won))
				}
				if when != "when the time is over" {
					time.Sleep(11 * time.Minute)
				}
				got = b.show(got)
				sameLease(t, "the winner's", won, b.show(won))
				claims(t, []conf.Lease{won, got})
				sameLease(t, "the loser's", got, b.show(got))
			})
		})
	}
}

// Only the subnet is contested; the agent that does not get it keeps the rest and is
// told where its subnet is.
func TestContradictorySubnet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		a, c := b.register("a", "10.0.0.1"), b.register("c", "10.0.0.2")
		// As a cluster without identities believes it: c's lease has a's subnet.
		c.Signed = &conf.SignedLease{Lease: strings.ReplaceAll(c.Signed.Lease, "9.0.1.0/24", "9.0.0.0/24")}
		b = b.loses(newStore(t))
		got := b.show(c)
		if got.Grants[0].Subnet != netip.MustParsePrefix("9.0.0.0/24") {
			t.Fatal(blocks(got))
		}
		told := b.show(a)
		if g := told.Grants[0]; told.VTEP != a.VTEP || g.Subnet.IsValid() || !strings.Contains(g.Error, "9.0.0.0/24 was granted to agent c (10.0.0.2) since") || told.Grants[1].Subnet6 != a.Grants[1].Subnet6 {
			t.Errorf("%+v", told)
		}
		time.Sleep(11 * time.Minute)
		claims(t, []conf.Lease{b.show(got), b.show(told)})
	})
}

// A lease with further blocks is adopted whole.
func TestAdoptFurtherBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		req := request("a", "10.0.0.1")
		req.Want = map[string]int{"dcos": 3, "dcos6": 2}
		a, err := b.Register(t.Context(), req)
		if err != nil || len(a.Grants[0].Blocks) != 2 || len(a.Grants[1].Blocks) != 1 {
			t.Fatalf("%+v, %v", a.Grants, err)
		}
		b = b.loses(newStore(t))
		got := b.show(a)
		kept(t, a, got)
		time.Sleep(11 * time.Minute)
		sameLease(t, "afterwards", got, b.show(got))
		fresh := b.register("new", "10.0.0.9")
		for _, p := range fresh.Peer().Subnets {
			if slices.Contains(a.Peer().Subnets, p) {
				t.Errorf("%s was granted twice", p)
			}
		}
	})
}

// What a lease that is shown no longer has is more than one transaction writes.
func TestAdoptInsteadOfManyBlocks(t *testing.T) {
	for name, with := range map[string]func(i int, b conf.Block) []conf.Block{
		"none": func(int, conf.Block) []conf.Block { return nil },
		"others": func(i int, _ conf.Block) []conf.Block {
			return []conf.Block{block(fmt.Sprintf("9.9.%d.0/24", i), fmt.Sprintf("fd01:b:0:0:9%02x::/80", i))}
		},
		"every second": func(i int, b conf.Block) []conf.Block {
			if i%2 == 0 {
				return nil
			}
			return []conf.Block{b}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStore(t)
				b := bubbleOf(t, coordinator.Options{Store: s}, `{
					"vtep_subnet": "44.128.0.0/20", "vtep_mac_oui": "70:B3:D5:00:00:00",
					"overlays": [{"name": "a", "subnet": "9.0.0.0/8", "prefix": 24, "subnet6": "fd01:b::/64", "prefix6": 80, "blocks_per_agent": 64}]}`)
				req := request("a", "10.0.0.1")
				req.Want = map[string]int{"a": 64}
				l, err := b.Register(t.Context(), req)
				if err != nil || len(l.Grants[0].Blocks) != 63 {
					t.Fatalf("%+v, %v", l, err)
				}
				// As a cluster without identities believes it: a later lease.
				had := l.Grants[0].Blocks
				l.Epoch, l.Signed, l.Grants[0].Blocks = l.Epoch+1000, nil, nil
				for i, h := range had {
					l.Grants[0].Blocks = append(l.Grants[0].Blocks, with(i, h)...)
				}
				text, err := json.Marshal(l)
				if err != nil {
					t.Fatal(err)
				}
				l.Signed = &conf.SignedLease{Lease: string(text)}
				got := b.show(l)
				kept(t, l, got)
				sameLease(t, "renewed", got, b.show(got))
				var want, have []string
				for _, p := range got.Peer().Subnets {
					want = append(want, "subnet/a/"+p.String())
				}
				kvs, _, err := s.List(t.Context(), "subnet/")
				if err != nil {
					t.Fatal(err)
				}
				for _, kv := range kvs {
					have = append(have, kv.Key)
				}
				slices.Sort(want)
				slices.Sort(have)
				if !slices.Equal(want, have) {
					t.Errorf("%d keys are in the store, want %d", len(have), len(want))
				}
			})
		})
	}
}

// Without identities a lease can be made up. It takes no epochs from those after it.
func TestForgedEpoch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		a := b.register("a", "10.0.0.1")
		forged := a
		forged.Epoch, forged.Signed = 1<<60, nil
		text, err := json.Marshal(forged)
		if err != nil {
			t.Fatal(err)
		}
		forged.Signed = &conf.SignedLease{Lease: string(text)}
		_, err = b.Register(t.Context(), shows(forged))
		refused(t, err, http.StatusForbidden, "which no coordinator gave")
		sameLease(t, "afterwards", a, b.show(a))
	})
}

// A record is taken away for what was in it then, not for what is in it meanwhile.
func TestRivalComesBackWithAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		first := b.register("earlier", "10.0.0.1")
		if _, err := b.Delete(t.Context(), []string{"earlier"}); err != nil {
			t.Fatal(err)
		}
		later := b.register("later", "10.0.0.2")
		second := b.register("earlier", "10.0.0.1")
		s := &hooked{Store: newStore(t), key: "agents/earlier", deletes: true}
		b = b.loses(s)
		kept(t, first, b.show(first))
		var now conf.Lease
		s.call = func() { now = b.show(second) }
		kept(t, later, b.show(later))
		kept(t, second, now)
		sameLease(t, "after the other came", now, b.show(now))
	})
}

// While leases are adopted a snapshot is said to be partial, so that nobody gives up
// peers that have not come back yet; when the time is over everybody is told all.
func TestSnapshotsWhileAdopting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, newStore(t))
		a, c := b.register("a", "10.0.0.1"), b.register("c", "10.0.0.2")
		b = b.loses(newStore(t))
		b.show(a)
		events, disconnect := b.connect("a")
		defer disconnect()
		next := func(what string, ok func(api.PeerEvent) bool) {
			t.Helper()
			timeout := time.After(12 * time.Minute)
			for {
				select {
				case e := <-events:
					if ok(e) {
						return
					}
				case <-timeout:
					t.Fatalf("not told: %s", what)
				}
			}
		}
		next("a partial snapshot", func(e api.PeerEvent) bool { return e.Snapshot && e.Partial && len(e.Put) == 1 })
		b.show(c)
		next("who is back", func(e api.PeerEvent) bool { return !e.Snapshot && slices.Contains(peerIDs(e), "c") })
		next("all, at the end", func(e api.PeerEvent) bool { return e.Snapshot && !e.Partial && len(e.Put) == 2 })
	})
}

// An older copy of the file takes its place. Who got or changed a lease since shows
// it, is believed, and keeps it; from then on nobody gets anything fresh.
func TestOlderFileNoticedByAgents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFile(t)
		b := f.start()
		first := b.register("first", "10.0.0.1")
		b = f.copied(b)
		first = b.show(first)
		moved := shows(first)
		moved.AgentIP = netip.MustParseAddr("10.0.0.11")
		first, err := b.Register(t.Context(), moved)
		if err != nil {
			t.Fatal(err)
		}
		var since []conf.Lease
		for i := range 30 { // more than the starts that follow write
			since = append(since, b.register(fmt.Sprint("agent-", i), fmt.Sprint("10.0.1.", i+1)))
		}

		b = f.putBack(b)
		kept(t, since[29], b.show(since[29]))
		b.waits(request("new", "10.0.0.9"))
		kept(t, first, b.show(first))
		// Who was away at that start, and at the next one, is not forgotten.
		b = f.again(b)
		b.waits(request("new", "10.0.0.9"))
		all := []conf.Lease{b.show(first), b.show(since[29])}
		for _, l := range since[:29] {
			got := b.show(l)
			kept(t, l, got)
			all = append(all, got)
		}
		time.Sleep(11 * time.Minute)
		claims(t, append(all, b.register("new", "10.0.0.9")))
	})
}

// The same, and nobody but those who are new comes before the time is over: what
// this coordinator remembers outside of the store keeps them off.
func TestOlderFileNoticedByWitness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "coordinator.db")
		begin := func() (*bubble, func()) {
			s := openStore(t, path)
			w, err := coordinator.OpenWitness(filepath.Join(dir, "epoch"), slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			b := bubbleWith(t, coordinator.Options{Store: s, Adopt: coordinator.Adopt{Witness: w}})
			return b, func() { b.stop(); s.Close(); w.Close() }
		}
		b, end := begin()
		b.register("first", "10.0.0.1")
		end()
		b, end = begin() // a mere restart is none
		b.register("second", "10.0.0.2")
		end()
		copyFile(t, path, path+".copy")
		b, end = begin()
		since := b.register("since", "10.0.0.3")
		end()
		copyFile(t, path+".copy", path)
		b, end = begin()
		b.waits(request("new", "10.0.0.9"))
		kept(t, since, b.show(since))
		end()
		b, end = begin()
		b.waits(request("new", "10.0.0.9"))
		time.Sleep(11 * time.Minute)
		claims(t, []conf.Lease{b.show(since), b.register("new", "10.0.0.9")})
		end()
		if err := os.WriteFile(filepath.Join(dir, "epoch"), []byte("half a li"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, end = begin() // it knows nothing then
		end()
	})
}

// A backup that was put back with overlayctl restore is known to be one.
func TestRestoreBeginsAdoption(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from := newStore(t)
		b := inBubble(t, from)
		a := b.register("a", "10.0.0.1")
		content, err := transfer.Read(t.Context(), from)
		if err != nil {
			t.Fatal(err)
		}
		since := b.register("since", "10.0.0.2")
		b.stop()
		restored, copied := newStore(t), newStore(t)
		if err := content.Restore(t.Context(), restored, time.Now()); err != nil {
			t.Fatal(err)
		}
		if err := content.Copy(t.Context(), copied, time.Now()); err != nil {
			t.Fatal(err)
		}
		b = inBubble(t, restored)
		b.waits(request("new", "10.0.0.9"))
		kept(t, since, b.show(since))
		kept(t, a, b.show(a))
		b.stop()
		b = inBubble(t, copied) // nothing is missing there
		b.register("new", "10.0.0.9")
		kept(t, a, b.show(a))
	})
}

// Agents register, renew, come and go for good; files are copied, put back by hand or
// with restore, lost, coordinators restarted, in any order. Everybody alive renews
// within the time for adoptions. At no moment do two that are alive hold the same.
func TestNoAddressHasTwoOwners(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { newHistory(t, seed).run(120) })
		})
	}
}

// history is a cluster through losses.
type history struct {
	t      *testing.T
	rand   *rand.Rand
	dir    string
	bubble *bubble
	store  *bbolt.Store
	files  *coordinator.WitnessFile
	adopt  string
	next   int
	alive  map[string]conf.Lease
	copies []string
}

func newHistory(t *testing.T, seed uint64) *history {
	h := &history{t: t, rand: rand.New(rand.NewPCG(seed, 1)), dir: t.TempDir(), alive: map[string]conf.Lease{}}
	h.start()
	return h
}

func (h *history) path() string { return filepath.Join(h.dir, "coordinator.db") }

func (h *history) start() {
	var err error
	discard := slog.New(slog.DiscardHandler)
	if h.store, err = bbolt.Open(h.path(), discard); err != nil {
		h.t.Fatal(err)
	}
	if h.files, err = coordinator.OpenWitness(filepath.Join(h.dir, "epoch"), discard); err != nil {
		h.t.Fatal(err)
	}
	h.bubble = bubbleWith(h.t, coordinator.Options{Store: h.store, Adopt: coordinator.Adopt{Cluster: h.adopt, Witness: h.files}})
	h.adopt = h.bubble.ClusterID()
}

func (h *history) stop() {
	h.bubble.stop()
	h.store.Close()
	h.files.Close()
}

func (h *history) run(steps int) {
	for range steps {
		switch n := h.rand.IntN(20); {
		case n < 8:
			h.join()
		case n < 12:
			h.renew()
		case n < 13:
			for id := range h.alive { // gone for good
				delete(h.alive, id)
				break
			}
		case n < 15:
			h.stop()
			to := filepath.Join(h.dir, fmt.Sprint("copy-", len(h.copies)))
			copyFile(h.t, h.path(), to)
			h.copies = append(h.copies, to)
			h.start()
		case n < 16:
			h.stop()
			h.start()
		case n < 17 && len(h.copies) > 0:
			h.stop()
			copyFile(h.t, h.copies[h.rand.IntN(len(h.copies))], h.path())
			h.start()
		case n < 18 && len(h.copies) > 0:
			h.restore(h.copies[h.rand.IntN(len(h.copies))])
		case n < 19:
			h.stop()
			if err := os.Remove(h.path()); err != nil {
				h.t.Fatal(err)
			}
			h.start()
		default:
			h.renewAll()
			time.Sleep(11 * time.Minute)
		}
		h.check()
	}
	h.renewAll()
	h.check()
	h.stop()
	h.t.Logf("%d agents, %d alive, %d copies", h.next, len(h.alive), len(h.copies))
}

func (h *history) join() {
	h.next++
	req := request(fmt.Sprint("agent-", h.next), fmt.Sprintf("10.1.%d.%d", h.next/200, h.next%200+1))
	if l, err := h.bubble.Register(h.t.Context(), req); err == nil {
		h.alive[l.AgentID] = l
	} else {
		refused(h.t, err, http.StatusServiceUnavailable, "lacks leases")
	}
}

// renew renews a part of the leases: it takes as long as it takes.
func (h *history) renew() {
	for id, l := range h.alive {
		if h.rand.IntN(3) == 0 {
			h.renewOne(id, l)
		}
	}
}

func (h *history) renewAll() {
	for id, l := range h.alive {
		h.renewOne(id, l)
	}
}

func (h *history) renewOne(id string, l conf.Lease) {
	got, err := h.bubble.Register(h.t.Context(), shows(l))
	if err != nil {
		h.t.Fatalf("agent %s, which is alive and has %s: %v", id, blocks(l), err)
	}
	if blocks(got) != blocks(l) || got.Epoch < l.Epoch {
		h.t.Errorf("agent %s has %s with epoch %d, and had %s with %d", id, blocks(got), got.Epoch, blocks(l), l.Epoch)
	}
	h.alive[id] = got
}

func (h *history) restore(path string) {
	h.stop()
	discard := slog.New(slog.DiscardHandler)
	from, err := bbolt.Open(path, discard)
	if err != nil {
		h.t.Fatal(err)
	}
	content, err := transfer.Read(h.t.Context(), from)
	from.Close()
	if err == nil {
		err = os.Remove(h.path())
	}
	var to store.Store
	if err == nil {
		to, err = bbolt.Open(h.path(), discard)
	}
	if err == nil {
		err = content.Restore(h.t.Context(), to, time.Now())
	}
	if err != nil {
		h.t.Fatal(err)
	}
	to.Close()
	h.start()
}

func (h *history) check() {
	h.t.Helper()
	var all []conf.Lease
	for _, l := range h.alive {
		all = append(all, l)
	}
	claims(h.t, all)
	if h.t.Failed() {
		h.t.FailNow()
	}
}
