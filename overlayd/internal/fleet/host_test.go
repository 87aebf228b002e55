package fleet

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/pki"
)

// host is an agent as far as coordinators are concerned, with a key, a certificate
// and connections of its own.
type host struct {
	req    api.RegisterRequest
	client *api.Client
	lease  conf.Lease // as first granted

	bytes  atomic.Int64 // of answers, unpacked
	events atomic.Int64 // of its streams
	whole  atomic.Int64 // snapshots among them
	at     atomic.Pointer[api.Known]
	with   atomic.Pointer[string] // whom it followed last
}

// watching counts what a host receives, and notes from whom.
type watching struct {
	h    *host
	next http.RoundTripper
}

func (w watching) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := w.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if strings.HasSuffix(req.URL.Path, api.PathWatch) {
		w.h.with.Store(&req.URL.Host)
	}
	res.Body = counted{res.Body, &w.h.bytes}
	return res, nil
}

type counted struct {
	io.ReadCloser
	n *atomic.Int64
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.ReadCloser.Read(b)
	c.n.Add(int64(n))
	return n, err
}

// hosts makes so many, which join with one token at their first request.
func (c *cluster) hosts(n int) []*host {
	c.t.Helper()
	token, dir := c.token("agent", n), c.t.TempDir()
	all := make([]*host, n)
	for i := range all {
		id := fmt.Sprintf("agent-%d", i)
		m, err := pki.OpenMember(pki.MemberOptions{
			Dir: filepath.Join(dir, id), Name: id, Token: func() (string, error) { return token, nil }, Now: time.Now, Log: slog.New(slog.DiscardHandler),
		})
		must(c.t, err)
		c.t.Cleanup(m.CloseIdleConnections)
		h := &host{req: api.RegisterRequest{
			AgentID: id, AgentIP: netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}), Bridges: conf.Halves[:],
		}}
		h.at.Store(&api.Known{})
		h.client, err = api.NewClient(c.urls(), &http.Client{Transport: watching{h, m}})
		must(c.t, err)
		h.client.Spread()
		all[i] = h
	}
	return all
}

// each calls f for every host, many at a time, and returns how long the whole took.
func each(hosts []*host, f func(*host)) time.Duration {
	began := time.Now()
	turn := make(chan struct{}, 128)
	var all sync.WaitGroup
	for _, h := range hosts {
		all.Go(func() { turn <- struct{}{}; f(h); <-turn })
	}
	all.Wait()
	return time.Since(began)
}

// join has all of them join and lease.
func join(t testing.TB, hosts []*host) time.Duration {
	t.Helper()
	took := each(hosts, func(h *host) {
		lease, err := h.client.Register(t.Context(), h.req)
		if err != nil {
			t.Error(err)
		}
		h.lease = lease
	})
	if t.Failed() {
		t.FailNow()
	}
	return took
}

// kept reports what a host was told otherwise than at first.
func (h *host) kept(now conf.Lease) error {
	was := h.lease
	if now.Epoch != was.Epoch || now.VTEP != was.VTEP || len(now.Grants) != len(was.Grants) {
		return fmt.Errorf("%s had epoch %d, %+v and has epoch %d, %+v", h.req.AgentID, was.Epoch, was.VTEP, now.Epoch, now.VTEP)
	}
	for i, g := range now.Grants {
		if g.Subnet != was.Grants[i].Subnet {
			return fmt.Errorf("%s had %s and has %s", h.req.AgentID, was.Grants[i].Subnet, g.Subnet)
		}
	}
	return nil
}

// follow is what an agent does until ctx ends.
func (h *host) follow(ctx context.Context) {
	for ctx.Err() == nil {
		_ = h.client.Watch(ctx, h.req.AgentID, *h.at.Load(), func(e api.PeerEvent) error {
			if e.Snapshot {
				h.whole.Add(1)
			}
			if e.Revision != 0 {
				h.at.Store(&api.Known{Revision: e.Revision, Run: e.Run})
			}
			h.events.Add(1)
			return nil
		})
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// followAll has all of them follow until the function that it returns is called. The
// first reads everything, which takes as many bytes as it returns; the others go on
// from there: that a thousand read everything is another measurement.
func followAll(t testing.TB, hosts []*host) (everything int64, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	stop = sync.OnceFunc(func() { cancel(); group.Wait() })
	t.Cleanup(stop)
	some := func(some []*host) {
		for _, h := range some {
			group.Go(func() { h.follow(ctx) })
		}
		following(t, some)
	}
	before := hosts[0].bytes.Load()
	some(hosts[:1])
	everything = hosts[0].bytes.Load() - before
	for _, h := range hosts[1:] {
		h.at.Store(hosts[0].at.Load())
	}
	some(hosts[1:])
	return everything, stop
}

// following waits until all of some have heard something.
func following(t testing.TB, hosts []*host) {
	t.Helper()
	eventually(t, "all follow", func() error {
		for _, h := range hosts {
			if h.events.Load() == 0 {
				return fmt.Errorf("%s does not", h.req.AgentID)
			}
		}
		return nil
	})
}
