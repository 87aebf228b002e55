package coordinator_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/pki"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// shared starts one of several coordinators on a store, at an address of its own. It
// names others before that one.
func shared(t testing.TB, s store.Store, addr string, others ...string) *node {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{store: s, url: "http://" + l.Addr().String()}
	n.Coordinator, err = coordinator.New(t.Context(), coordinator.Options{
		Network: parseNetwork(t, seedNetwork), Store: s, Log: slog.New(slog.DiscardHandler), Version: "test", Shared: true, URLs: append(others, n.url),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var ran sync.WaitGroup
	for _, f := range []func() error{func() error { return n.Run(ctx) }, func() error { return n.Serve(ctx, l) }} {
		ran.Go(func() {
			if err := f(); err != nil {
				t.Error(err)
			}
		})
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	n.client = newClient(t, n.url, &http.Client{Transport: transport})
	n.stop = sync.OnceFunc(func() {
		transport.CloseIdleConnections()
		cancel()
		ran.Wait()
	})
	t.Cleanup(n.stop)
	eventually(t, "ready", func() bool { return n.client.Ready(t.Context()) == nil })
	return n
}

// lists waits until a coordinator lists so many containers, all there are.
func (n *node) lists(t testing.TB, total int, within time.Duration) {
	t.Helper()
	began := time.Now()
	var got api.Containers
	var err error
	eventually(t, fmt.Sprintf("%d containers", total), func() bool {
		got, err = n.client.Containers(t.Context(), nil)
		return err == nil && got.Total == total && len(got.Incomplete) == 0
	})
	took := time.Since(began)
	t.Logf("%s lists all %d containers after %s", n.url, total, took.Round(time.Millisecond))
	if took > within {
		t.Errorf("it took %s, want at most %s", took, within)
	}
}

// TestCoordinatorsTellEachOther: every coordinator answers for the agents of all,
// names those that it cannot reach, and is complete again when they are back.
func TestCoordinatorsTellEachOther(t *testing.T) {
	s := newStore(t)
	a, b := shared(t, s, "127.0.0.1:0"), shared(t, s, "127.0.0.1:0")
	events := a.events(t, -1)
	one, two := a.reporting(t, 1), b.reporting(t, 2)
	one.must([]api.Attachment{containerOf(one.lease, 0)}, nil, usageOf(one.lease, 1, 0))
	two.must([]api.Attachment{containerOf(two.lease, 0), containerOf(two.lease, 1)}, nil, usageOf(two.lease, 2, 0))
	a.lists(t, 3, 5*time.Second)
	b.lists(t, 3, 5*time.Second)
	two.must(nil, []string{containerOf(two.lease, 0).Key()}, usageOf(two.lease, 1, 1))
	a.lists(t, 2, 2*time.Second)
	if e := nextEvent(t, events, api.EventContainerDetached); e.AgentID != two.lease.AgentID {
		t.Errorf("%+v", e)
	}
	for _, n := range []*node{a, b} {
		addresses, err := n.client.Addresses(t.Context(), url.Values{})
		if err != nil || len(addresses.Overlays) != 1 || addresses.Overlays[0].Count != (api.Count{Total: 250, Used: 2, Cooling: 1, Free: 247}) {
			t.Errorf("%v, %+v", err, addresses)
		}
	}

	// An agent that moves goes on where it was.
	two.client = a.client
	two.must([]api.Attachment{containerOf(two.lease, 5)}, nil, usageOf(two.lease, 2, 1))
	a.lists(t, 3, time.Second)
	b.lists(t, 3, 2*time.Second)

	// One of them is stopped: its agents go to the other, and it comes back with
	// nothing in memory.
	b.stop()
	eventually(t, "it is missed", func() bool {
		got, err := a.client.Containers(t.Context(), nil)
		return err == nil && len(got.Incomplete) == 1 && got.Incomplete[0] == b.url && got.Total == 3
	})
	one.must([]api.Attachment{containerOf(one.lease, 9)}, nil, usageOf(one.lease, 2, 0))
	again := shared(t, s, b.url[len("http://"):])
	again.lists(t, 4, 30*time.Second)
	eventually(t, "the dead one is not waited for", func() bool {
		got, err := a.client.Containers(t.Context(), nil)
		return err == nil && len(got.Incomplete) == 0 && got.Total == 4
	})
}

// TestCoordinatorsIdentify: coordinators tell each other, over TLS, and agents and
// strangers are told nothing.
func TestCoordinatorsIdentify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	share := func(_ *pki.Options, o *coordinator.Options) { o.Shared = true }
	a := startSecure(t, s, path, share)
	b := startSecure(t, s, path, share, withToken(a.token(t, api.TokenRequest{Role: "coordinator"})))
	p := b.agent(t, "host")
	req := request("host", "10.0.0.1")
	req.Instance = "i"
	lease, err := p.Register(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.ReportAttachments(t.Context(), api.AttachmentReport{AgentID: "host", Instance: "i", Sequence: 1, Snapshot: true, Put: []api.Attachment{containerOf(lease, 0)}}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other coordinator knows it", func() bool {
		got, err := a.root.Containers(t.Context(), nil)
		return err == nil && got.Total == 1 && len(got.Incomplete) == 0
	})
	nothing := func(api.AttachmentLine) error { t.Error("something was told"); return nil }
	refused(t, p.Attachments(t.Context(), nothing), http.StatusForbidden, "may not do that")
	refused(t, newClient(t, a.url, stranger(t)).Attachments(t.Context(), nothing), http.StatusUnauthorized)
}

// stranger trusts whomever it talks to, and shows no certificate.
func stranger(t testing.TB) *http.Client {
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}
