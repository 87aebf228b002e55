package fleet

import (
	"context"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestFailOver: hosts are spread over three coordinators, which are processes on an
// etcd of three members. One is killed: its hosts renew and follow elsewhere within
// ten seconds, and are told what has changed, not everything again.
func TestFailOver(t *testing.T) {
	const limit = 10 * time.Second
	n := 200
	if *full {
		n = 1000
	}
	c := newCluster(t, "etcd", 3)
	hosts := c.hosts(n)
	t.Logf("%d hosts joined within %v", n, join(t, hosts).Round(time.Millisecond))
	everything, _ := followAll(t, hosts)
	dead := strings.TrimPrefix(c.all[0].url, "https://")
	var moving []*host
	for _, h := range hosts {
		if *h.with.Load() == dead {
			moving = append(moving, h)
		}
	}
	if len(moving) < n/5 {
		t.Fatalf("%d of %d hosts are at one of three coordinators", len(moving), n)
	}
	for _, h := range moving {
		h.bytes.Store(0)
		h.events.Store(0)
		h.whole.Store(0)
	}
	began := time.Now()
	c.all[0].kill()
	renewed := each(moving, func(h *host) {
		lease, err := h.client.Register(t.Context(), h.req)
		if err == nil {
			err = h.kept(lease)
		}
		if err != nil {
			t.Error(err)
		}
	})
	following(t, moving)
	followed := time.Since(began)
	var bytes, whole int64
	for _, h := range moving {
		bytes += h.bytes.Load()
		whole += h.whole.Load()
	}
	bytes /= int64(len(moving))
	t.Logf("%d of %d hosts renewed elsewhere within %v and followed within %v; %d bytes each, where everything takes %d, %d snapshots; load %s",
		len(moving), n, renewed.Round(time.Millisecond), followed.Round(time.Millisecond), bytes, everything, whole, load(t))
	if renewed > limit || followed > limit {
		t.Errorf("%v and %v, want at most %v", renewed, followed, limit)
	}
	if whole > 0 || bytes*4 > everything {
		t.Errorf("%d snapshots, %d bytes to each; everything takes %d", whole, bytes, everything)
	}
}

// TestFleet, on etcd, and at full length on a file, too: hosts with identities join, renew all the time, each every five seconds,
// and go on doing so while a coordinator is killed every five seconds. Nobody's lease
// changes.
func TestFleet(t *testing.T) {
	n, whole, killed, stores := 100, 2*time.Second, every+time.Second, []string{"etcd"}
	if *full {
		n, whole, killed, stores = 1000, *span, *kill, []string{"bbolt", "etcd"}
	}
	for _, store := range stores {
		t.Run(store, func(t *testing.T) {
			c := newCluster(t, store, 3)
			hosts := c.hosts(n)
			joined := join(t, hosts)
			t.Logf("%d hosts joined within %v; load %s", n, joined.Round(time.Millisecond), load(t))
			if joined > time.Minute {
				t.Errorf("joined within %v, want a minute at most", joined)
			}
			followAll(t, hosts)
			c.undisturbed(t, hosts, whole)
			c.killed(t, hosts, killed)
		})
	}
}

// every is how often a host renews, far more often than an agent does.
const every = 5 * time.Second

// renew has all hosts renew for some time, and returns how long each waited and how
// many attempts failed.
func renew(t *testing.T, hosts []*host, whole time.Duration) (waits []time.Duration, failed int64) {
	ctx, cancel := context.WithTimeout(t.Context(), whole)
	defer cancel()
	var mu sync.Mutex
	var failures atomic.Int64
	var all sync.WaitGroup
	for i, h := range hosts {
		all.Go(func() {
			// Spread over the time, as hosts are that came one by one.
			tick := time.NewTimer(time.Duration(i) * every / time.Duration(len(hosts)))
			defer tick.Stop()
			var own []time.Duration
			for {
				select {
				case <-tick.C:
				case <-ctx.Done():
					mu.Lock()
					waits = append(waits, own...)
					mu.Unlock()
					return
				}
				tick.Reset(every)
				asked := time.Now()
				lease, err := h.client.Register(t.Context(), h.req)
				if err != nil {
					failures.Add(1)
					continue
				}
				own = append(own, time.Since(asked))
				if err := h.kept(lease); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	return waits, failures.Load()
}

func (c *cluster) undisturbed(t *testing.T, hosts []*host, whole time.Duration) {
	const limit = 50 * time.Millisecond
	before, began := c.cpu(), time.Now()
	waits, failed := renew(t, hosts, whole)
	took := time.Since(began)
	cores := (c.cpu() - before) / took.Seconds()
	slices.Sort(waits)
	p99 := waits[len(waits)*99/100]
	t.Logf("%d renewals in %v: p50 %v, p99 %v, longest %v; %.2f cores for the coordinators; load %s",
		len(waits), took.Round(time.Second), waits[len(waits)/2], p99, waits[len(waits)-1], cores, load(t))
	if failed > 0 {
		t.Errorf("%d renewals failed", failed)
	}
	if *full && p99 > limit {
		t.Errorf("p99 of a renewal %v, want at most %v", p99, limit)
	}
	if cores > 1 {
		t.Errorf("%.2f cores for the coordinators, want less than one", cores)
	}
}

// killed has one coordinator after the other killed, and started again, meanwhile.
func (c *cluster) killed(t *testing.T, hosts []*host, whole time.Duration) {
	end := time.Now().Add(whole)
	var kills int
	var killing sync.WaitGroup
	killing.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for time.Now().Before(end) {
			<-tick.C
			p := c.all[kills%len(c.all)]
			kills++
			p.kill()
			if err := p.start(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	waits, failed := renew(t, hosts, whole)
	killing.Wait()
	for _, p := range c.all {
		eventually(t, p.url+" is ready", func() error { return p.root.Ready(t.Context()) })
	}
	each(hosts, func(h *host) {
		lease, err := h.client.Register(t.Context(), h.req)
		if err == nil {
			err = h.kept(lease)
		}
		if err != nil {
			t.Error(err)
		}
	})
	slices.Sort(waits)
	t.Logf("%d kills in %v: %d renewals, p99 %v, %d attempts failed meanwhile, no lease lost or changed; load %s",
		kills, whole, len(waits), waits[len(waits)*99/100], failed, load(t))
}
