package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestNewClientURLs(t *testing.T) {
	for _, tt := range []struct{ url, want, problem string }{
		{"http://10.0.0.1:6440", "http://10.0.0.1:6440", ""},
		{" https://coordinator.example/ ", "https://coordinator.example", ""},
		{"http://[fd00::1]:6440", "http://[fd00::1]:6440", ""},
		{"http://[fe80::1%25eth0]:6440", "http://[fe80::1%25eth0]:6440", ""},
		{"https://[fe80::1%25eth0]", "https://[fe80::1%25eth0]", ""},
		{"http://[fe80::1%eth0]:6440", "", "invalid URL escape"},
		{"http://[fd00::1%25eth0]:6440", "", "only a link-local address has a zone"},
		{"", "", "empty"},
		{"10.0.0.1:6440", "", "scheme is missing"},
		{"localhost", "", "scheme is missing"},
		{"ftp://10.0.0.1", "", `"ftp"`},
		{"http://", "", "host is missing"},
		{"http://:6440", "", "host is missing"},
		{"http://10.0.0.1:6440/v1", "", "beside"},
		{"http://user@10.0.0.1:6440", "", "beside"},
		{"http://10.0.0.1:6440?x=1", "", "beside"},
		{"http://10.0.0.1:port", "", "port"},
	} {
		c, err := api.NewClient([]string{tt.url}, nil)
		switch {
		case tt.problem == "" && err != nil:
			t.Errorf("%q: %v", tt.url, err)
		case tt.problem == "":
			if diff := cmp.Diff([]string{tt.want}, c.URLs()); diff != "" {
				t.Errorf("%q:\n%s", tt.url, diff)
			}
		case err == nil || !strings.Contains(err.Error(), tt.problem) || !strings.Contains(err.Error(), "http://10.0.0.1:6440"):
			t.Errorf("%q: error %v, want one with %q and an example", tt.url, err, tt.problem)
		}
	}
	if _, err := api.NewClient(nil, nil); err == nil {
		t.Error("no URL, no error")
	}
}

// server answers with a fixed status and body and counts.
func server(t *testing.T, code int, body string) (url string, asked *int) {
	t.Helper()
	asked = new(int)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*asked++
		w.WriteHeader(code)
		io.WriteString(w, body)
	}))
	t.Cleanup(s.Close)
	return s.URL, asked
}

func dead(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return "http://" + l.Addr().String()
}

func newClient(t *testing.T, urls ...string) *api.Client {
	t.Helper()
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	c, err := api.NewClient(urls, &http.Client{Transport: transport})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The first that answers is used, and asked first from then on.
func TestTriesInTurn(t *testing.T) {
	busy, busyAsked := server(t, http.StatusServiceUnavailable, `{"error": "not ready"}`)
	good, goodAsked := server(t, http.StatusOK, `[]`)
	c := newClient(t, dead(t), busy, good)
	for range 3 {
		if _, err := c.Agents(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if *busyAsked != 1 || *goodAsked != 3 {
		t.Errorf("the busy one was asked %d times, the good one %d times", *busyAsked, *goodAsked)
	}
	c = newClient(t, dead(t), busy)
	_, err := c.Agents(t.Context())
	var refusal *api.Error
	if !errors.As(err, &refusal) || refusal.Code != http.StatusServiceUnavailable || !strings.Contains(err.Error(), "refused") {
		t.Errorf("error %v, want what both said", err)
	}
}

// A refusal is an answer; the other coordinators would say the same.
func TestRefusalIsFinal(t *testing.T) {
	no, _ := server(t, http.StatusInsufficientStorage, `{"error": "no free VTEP address"}`)
	other, asked := server(t, http.StatusOK, `{}`)
	c := newClient(t, no, other)
	_, err := c.Register(t.Context(), api.RegisterRequest{AgentID: "a", AgentIP: netip.MustParseAddr("10.0.0.1")})
	var refusal *api.Error
	if !errors.As(err, &refusal) || refusal.Code != 507 || refusal.Message != "no free VTEP address" || *asked != 0 {
		t.Errorf("error %v, other asked %d times", err, *asked)
	}
}

func TestNotACoordinator(t *testing.T) {
	for _, tt := range []struct {
		code int
		body string
		want string
	}{
		{404, "<html>", "is it a coordinator?"},
		{200, "<html>", "cannot be read"},
		{500, `{"other": 1}`, "is it a coordinator?"},
	} {
		url, _ := server(t, tt.code, tt.body)
		if _, err := newClient(t, url).State(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%d %s: error %v, want %q", tt.code, tt.body, err, tt.want)
		}
	}
}

func TestRequests(t *testing.T) {
	var got []string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got = append(got, fmt.Sprintf("%s %s %s", r.Method, r.URL, b))
		switch r.URL.Path {
		case api.PathStatus:
			w.WriteHeader(http.StatusNoContent)
		case api.PathAgents, api.PathOverlays:
			io.WriteString(w, "[]")
		case api.PathRegister:
			io.WriteString(w, `{"agent_id": "a", "epoch": 7}`)
		default:
			io.WriteString(w, "{}")
		}
	}))
	defer s.Close()
	c := newClient(t, s.URL)
	ctx := t.Context()
	lease, err := c.Register(ctx, api.RegisterRequest{AgentID: "a", AgentIP: netip.MustParseAddr("10.0.0.1"), Bridges: []conf.Half{conf.Mesos}})
	if err != nil || lease.Epoch != 7 {
		t.Errorf("%+v, %v", lease, err)
	}
	_, err2 := c.State(ctx)
	_, err3 := c.Agents(ctx)
	_, err4 := c.Overlays(ctx)
	_, err5 := c.Delete(ctx, nil)
	err = errors.Join(err2, err3, err4, err5,
		c.Report(ctx, api.StatusReport{AgentID: "a", Overlays: map[string]conf.OverlayStatus{"dcos": {Status: conf.StatusOK}}}),
		c.Ready(ctx))
	if err != nil {
		t.Error(err)
	}
	want := []string{
		`POST /v1/register {"agent_id":"a","agent_ip":"10.0.0.1","bridges":["mesos"],"version":""}`,
		`GET /overlay-master/state `,
		`GET /v1/agents `,
		`GET /v1/overlays `,
		`POST /overlay-master/agents/delete {"agents":[]}`,
		`POST /v1/status {"agent_id":"a","overlays":{"dcos":{"status":"STATUS_OK"}}}`,
		`GET /readyz `,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
}

func TestWatch(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if q := r.URL.Query(); q.Get("agent") != "a&b" || q.Get("revision") != "5" {
			t.Errorf("query %s", r.URL.RawQuery)
		}
		enc := json.NewEncoder(w)
		enc.Encode(api.PeerEvent{Revision: 6, Snapshot: true})
		enc.Encode(api.PeerEvent{Revision: 7})
	}))
	defer s.Close()
	c := newClient(t, dead(t), s.URL)
	var revisions []uint64
	err := c.Watch(t.Context(), "a&b", api.Known{Revision: 5}, func(e api.PeerEvent) error {
		revisions = append(revisions, e.Revision)
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "ended the stream") {
		t.Errorf("error %v", err)
	}
	if diff := cmp.Diff([]uint64{6, 7}, revisions); diff != "" {
		t.Error(diff)
	}
	enough := errors.New("enough")
	if err := c.Watch(t.Context(), "a&b", api.Known{Revision: 5}, func(api.PeerEvent) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("error %v, want that of fn", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = c.Watch(ctx, "a&b", api.Known{Revision: 5}, func(api.PeerEvent) error { cancel(); return nil })
	if err == nil {
		t.Error("no error of a watch whose context ended")
	}
}

// A watch on which nothing is heard ends; a heartbeat, or a part of a long
// event, is something.
func TestWatchSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		c, err := api.NewClient([]string{"http://coordinator"}, &http.Client{
			Transport: roundTripper(func(req *http.Request) (*http.Response, error) {
				context.AfterFunc(req.Context(), func() { r.CloseWithError(req.Context().Err()) })
				return &http.Response{StatusCode: 200, Body: r, Request: req}, nil
			}),
		})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		go func() {
			for _, part := range []string{`{"revision": 1}`, `{"revision":`, ` 2`, `}`} {
				time.Sleep(api.WatchTimeout - time.Second)
				io.WriteString(w, part)
			}
		}()
		events := 0
		err = c.Watch(t.Context(), "a", api.Known{}, func(api.PeerEvent) error {
			events++
			time.Sleep(2 * api.WatchTimeout) // a slow fn is not silence
			return nil
		})
		if err == nil || !strings.Contains(err.Error(), "nothing was received") || events != 2 {
			t.Errorf("%d events, error %v", events, err)
		}
		if took := time.Since(began); took < 4*api.WatchTimeout {
			t.Errorf("ended after %s", took)
		}
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A coordinator that accepts and says nothing does not hold up a request for
// ever: the next one is asked.
func TestHangingCoordinator(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := api.NewClient([]string{"http://hangs", "http://answers"}, &http.Client{
			Transport: roundTripper(func(req *http.Request) (*http.Response, error) {
				if req.URL.Host == "hangs" {
					<-req.Context().Done()
					return nil, req.Context().Err()
				}
				return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader("[]")), Request: req}, nil
			}),
		})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err := c.Agents(t.Context()); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took != api.MoveOnTimeout {
			t.Errorf("answered after %s, want %s", took, api.MoveOnTimeout)
		}
	})
}
