package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/dirwatch"
	"overlayd.internal/overlay/overlayd/internal/problems"
)

// withStore does something with the address store of an overlay, as a CNI program
// does.
func (h *testHost) withStore(overlay string, f func(*ipam.Store)) {
	h.t.Helper()
	s, err := ipam.Open(h.t.Context(), ipam.Options{Dir: h.path(conf.IPAMDir), Overlay: overlay, Cooling: h.opts.Cooling})
	must(h.t, err)
	defer s.Close()
	f(s)
}

func containerAttachment(id string) conf.Attachment {
	return conf.Attachment{Network: "dcos", ContainerID: id, IfName: "eth0"}
}

// attach reserves an address in the Docker half, whose plugin is not here.
func (h *testHost) attach(id string) (a netip.Addr) {
	h.t.Helper()
	h.withStore("dcos", func(s *ipam.Store) {
		got, err := s.Allocate(h.t.Context(), ipam.Request{Attachment: containerAttachment(id), Half: conf.Docker, Ranges: []netip.Prefix{prefix("9.0.0.128/25")}})
		must(h.t, err)
		a = got.Addrs[0]
	})
	return a
}

func (h *testHost) detach(id string) {
	h.t.Helper()
	h.withStore("dcos", func(s *ipam.Store) {
		_, err := s.Release(h.t.Context(), containerAttachment(id))
		must(h.t, err)
	})
}

// listed waits until the coordinator lists so many containers, and returns them.
func (c *cluster) listed(within time.Duration, n int, query ...string) (found api.Containers) {
	c.t.Helper()
	v := url.Values{}
	for i := 0; i < len(query); i += 2 {
		v.Set(query[i], query[i+1])
	}
	began := time.Now()
	eventually(c.t, fmt.Sprintf("%d containers", n), func() (err error) {
		if found, err = c.client().Containers(c.t.Context(), v); err == nil && found.Total != n {
			err = fmt.Errorf("%d containers: %+v", found.Total, found)
		}
		return err
	})
	took := time.Since(began)
	c.t.Logf("%d containers are listed after %s", n, took.Round(time.Millisecond))
	if took > within {
		c.t.Errorf("it took %s, want at most %s", took, within)
	}
	return found
}

// What is attached and how full the halves are is at the coordinator within two
// seconds, and again after it was killed or our agent was.
func TestInventory(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	eventually(t, "the first report", func() error {
		a, err := c.client().Addresses(t.Context(), nil)
		if err == nil && len(a.Agents) != 4 {
			err = fmt.Errorf("%+v", a)
		}
		return err
	})
	before := time.Now().Add(-time.Second)
	address := h.attach("aaaa")
	got := c.listed(2*time.Second, 1).Containers[0]
	if got.ID != "aaaa" || got.Overlay != "dcos" || got.Half != conf.Docker || got.Network != "dcos" || got.IfName != "eth0" ||
		!slices.Equal(got.Addresses, []netip.Addr{address}) || got.AgentID != h.id() || got.AgentIP != h.opts.IP || got.Since.Before(before.Add(-time.Second)) || got.Since.After(time.Now()) {
		t.Errorf("got %+v", got)
	}
	for i := range 30 {
		h.attach(fmt.Sprintf("bb%02d", i))
	}
	c.listed(2*time.Second, 31)
	h.detach("bb07")
	c.listed(2*time.Second, 30)
	usage := func(want api.Count) {
		t.Helper()
		eventually(t, "addresses", func() error {
			a, err := c.client().Addresses(t.Context(), url.Values{"overlay": {"dcos"}})
			if err != nil {
				return err
			}
			for _, o := range a.Overlays {
				if o.Half == conf.Docker && o.Count == want {
					return nil
				}
			}
			return fmt.Errorf("%+v, want %+v", a.Overlays, want)
		})
	}
	usage(api.Count{Total: 125, Used: 30, Cooling: 1, Free: 94})

	c.stop()
	h.detach("bb08")
	h.attach("cccc")
	c.start()
	c.listed(30*time.Second, 30)
	c.listed(time.Second, 1, "q", "cccc")
	usage(api.Count{Total: 125, Used: 30, Cooling: 2, Free: 93})

	h.restart()
	h.detach("cccc")
	c.listed(10*time.Second, 29)

	// A host whose lease is given back is forgotten, and comes back.
	_, err := c.client().Delete(t.Context(), []string{h.id()})
	must(t, err)
	c.listed(10*time.Second, 29)
}

// A host that is left alone is not looked at for ever: reading a store is a change
// of its directory, too.
func TestInventoryRests(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.tune = func(timing *timing) { timing.files = time.Hour }
	h.start()
	h.ready()
	h.attach("aaaa")
	c.listed(10*time.Second, 1)
	eventually(t, "rest", func() error {
		before := h.looks()
		wait(t, 3*time.Second)
		if n := h.looks() - before; n > 0 {
			return fmt.Errorf("%v looks in three seconds", n)
		}
		return nil
	})
}

// On a host that is so busy that a look takes long, what is attached is told all the same.
func TestInventoryOfABusyHost(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	reported := make(chan time.Time, 1)
	n := 0
	v := &inventory{
		send: func(context.Context, api.AttachmentReport) (int, error) {
			reported <- time.Now()
			return http.StatusNoContent, nil
		},
		state: func() (conf.State, []string) {
			<-time.After(80 * time.Millisecond)
			n++
			return conf.State{}, []string{fmt.Sprint("look ", n)}
		},
		routes: func() []netip.Prefix { return nil }, runDir: t.TempDir(), id: "agent", timing: defaultTiming, counts: newCounts("test"),
		problems: problems.New(slog.New(slog.DiscardHandler)), watched: dirwatch.New(), begun: make(chan struct{}, 1), told: make(chan struct{}, 1), whole: true,
	}
	ended := make(chan error, 1)
	go func() { ended <- v.run(ctx) }()
	v.begun <- struct{}{}
	first := <-reported
	v.told <- struct{}{}
	if took := (<-reported).Sub(first); took > 3*time.Second {
		t.Errorf("the next report came %s later", took)
	}
	cancel()
	must(t, <-ended)
}

// looks is how often the address stores were read for a report, as the metrics say.
func (h *testHost) looks() (n float64) {
	h.t.Helper()
	_, page, err := h.get(api.PathMetrics)
	must(h.t, err)
	for line := range strings.SplitSeq(page, "\n") {
		if s, ok := strings.CutPrefix(line, "overlay_agent_inventory_reads_total "); ok {
			_, err := fmt.Sscan(s, &n)
			must(h.t, err)
		}
	}
	return n
}

// What is reported in parts arrives whole, and in order.
func TestInventoryParts(t *testing.T) {
	v := &inventory{id: "a", own: "i", whole: true, seen: content{put: map[string]api.Attachment{}, usage: map[halfKey]api.HalfUsage{}}}
	fill := func(from, to int) {
		put := map[string]api.Attachment{}
		for i := from; i < to; i++ {
			a := api.Attachment{ID: fmt.Sprint(i), Overlay: "o"}
			put[a.Key()] = a
		}
		v.seen.put = put
	}
	have := map[string]bool{}
	drain := func() (reports int) {
		for {
			r, next := v.compare()
			if r.Sequence == v.sequence {
				return reports
			}
			if len(r.Put) > maxChanges || r.Sequence != v.sequence+1 {
				t.Fatalf("a report of %d with sequence %d after %d", len(r.Put), r.Sequence, v.sequence)
			}
			if r.Snapshot {
				clear(have)
			}
			for _, key := range r.Delete {
				delete(have, key)
			}
			for _, a := range r.Put {
				have[a.Key()] = true
			}
			v.whole, v.accepted, v.sequence = false, next, r.Sequence
			reports++
		}
	}
	fill(0, 2*maxChanges+100)
	if n := drain(); n != 3 || len(have) != 2*maxChanges+100 {
		t.Errorf("%d reports, %d attachments", n, len(have))
	}
	fill(50, 2*maxChanges+150)
	if n := drain(); n != 1 || len(have) != 2*maxChanges+100 {
		t.Errorf("%d reports, %d attachments", n, len(have))
	}
	if n := drain(); n != 0 {
		t.Errorf("%d reports of nothing", n)
	}
}
