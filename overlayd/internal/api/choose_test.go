package api_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// farm is coordinators that exist in the transport only.
type farm struct {
	down  [3]atomic.Bool
	hangs [3]atomic.Bool
	asked [3]atomic.Int64
}

func (f *farm) RoundTrip(r *http.Request) (*http.Response, error) {
	n := int(r.URL.Host[1] - '0')
	if f.hangs[n].Load() {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	if f.down[n].Load() {
		return nil, errors.New("connection refused")
	}
	if r.URL.Path != api.PathReady {
		f.asked[n].Add(1)
	}
	return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader("[]")), Request: r}, nil
}

func (f *farm) client(t *testing.T) *api.Client {
	t.Helper()
	c, err := api.NewClient([]string{"http://c0", "http://c1", "http://c2"}, &http.Client{Transport: f})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Clients spread over all coordinators, those of one that ends over the others,
// and all are back evenly after it returned.
func TestSpread(t *testing.T) {
	const clients = 600
	f := &farm{}
	var all []*api.Client
	for range clients {
		c := f.client(t)
		c.Spread()
		all = append(all, c)
	}
	round := func() (asked [3]int64) {
		for i := range f.asked {
			f.asked[i].Store(0)
		}
		for _, c := range all {
			if _, err := c.Agents(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		for i := range asked {
			asked[i] = f.asked[i].Load()
		}
		return asked
	}
	expect := func(when string, got [3]int64, want ...int64) {
		t.Helper()
		for i, n := range got {
			if n < want[i]*3/4 || n > want[i]*5/4 {
				t.Errorf("%s: asked %v, want about %v", when, got, want)
				return
			}
		}
	}
	before := round()
	expect("all up", before, 200, 200, 200)
	f.down[1].Store(true)
	expect("one down", round(), 300, 0, 300)
	for _, c := range all {
		c.Return(t.Context())
	}
	expect("it is down still", round(), 300, 0, 300)
	f.down[1].Store(false)
	expect("it is back, and nobody has looked", round(), 300, 0, 300)
	moved := int64(0)
	for _, c := range all {
		if c.Return(t.Context()) {
			moved++
		}
	}
	if after := round(); after != before || moved != before[1] {
		t.Errorf("asked %v and %d moved, want %v as before", after, moved, before)
	}
}

// A coordinator that stops answering is left within seconds, by requests and by
// watches.
func TestMovesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &farm{}
		c := f.client(t)
		if _, err := c.Agents(t.Context()); err != nil {
			t.Fatal(err)
		}
		f.hangs[0].Store(true)
		for range 2 {
			if _, err := c.Agents(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if f.asked[1].Load() != 2 {
			t.Errorf("asked %d times, want both requests at the next", f.asked[1].Load())
		}
		c.MoveOn()
		c.Agents(t.Context())
		if f.asked[2].Load() != 1 {
			t.Error("MoveOn does not lead to the next")
		}
		// All hang: the last of a round gets all the time there is.
		f.hangs[1].Store(true)
		f.hangs[2].Store(true)
		began := time.Now()
		if _, err := c.Agents(t.Context()); err == nil {
			t.Error("no error")
		}
		if took := time.Since(began); took != 2*api.MoveOnTimeout+api.RequestTimeout {
			t.Errorf("gave up after %s", took)
		}
	})
}

// Who waits no longer than for one or two that hang still hears of the third.
func TestWithin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, all := range []time.Duration{5 * time.Second, time.Second} {
			f := &farm{}
			c := f.client(t)
			c.Within(all)
			f.hangs[0].Store(true)
			f.hangs[1].Store(true)
			ctx, cancel := context.WithTimeout(t.Context(), all)
			if _, err := c.Agents(ctx); err != nil || f.asked[2].Load() != 1 {
				t.Errorf("within %s: %v; the third was asked %d times", all, err, f.asked[2].Load())
			}
			cancel()
		}
	})
}

// A stream that falls silent at one of several coordinators ends sooner than at
// the only one.
func TestWatchMovesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		first := true
		transport := roundTripper(func(r *http.Request) (*http.Response, error) {
			pr, pw := io.Pipe()
			talks := first
			first = false
			go func() {
				if talks { // one event, then nothing more
					fmt.Fprintln(pw, `{"revision":1}`)
				}
				<-r.Context().Done()
				pw.CloseWithError(r.Context().Err())
			}()
			return &http.Response{StatusCode: 200, Body: pr, Request: r}, nil
		})
		c, err := api.NewClient([]string{"http://c0", "http://c1"}, &http.Client{Transport: transport})
		if err != nil {
			t.Fatal(err)
		}
		watch := func() time.Duration {
			began := time.Now()
			err := c.Watch(ctx, "a", api.Known{}, func(api.PeerEvent) error { return nil })
			if !strings.Contains(fmt.Sprint(err), "nothing was received") {
				t.Errorf("error %v", err)
			}
			return time.Since(began)
		}
		if took := watch(); took != api.MoveOnSilence {
			t.Errorf("the silent stream ended after %s, want %s", took, api.MoveOnSilence)
		}
		if took := watch(); took != api.MoveOnTimeout+api.RequestTimeout {
			t.Errorf("streams that never begin ended after %s", took)
		}
	})
}

// http_proxy is for other programs: coordinators are in the cluster.
func TestProxyOfTheEnvironmentIsNotUsed(t *testing.T) {
	proxy, asked := server(t, http.StatusOK, `[]`)
	for _, name := range []string{"http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"} {
		t.Setenv(name, proxy)
	}
	// No proxy is used for loopback addresses. This is none, and nothing leaves by lo.
	c, err := api.NewClient([]string{"http://[fe80::1%25lo]:1"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := c.Ready(ctx); err == nil || *asked != 0 {
		t.Errorf("error %v; the proxy was asked %d times", err, *asked)
	}
}
