package door_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/page/door"
)

const patience = 20 * time.Second

// coordinator is one that says what it was asked for.
type coordinator struct {
	*httptest.Server
	mu    sync.Mutex
	asked []string
	lines chan string // what its stream says
}

func newCoordinator(t *testing.T) *coordinator {
	c := &coordinator{lines: make(chan string)}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		c.asked = append(c.asked, r.Method+" "+r.URL.RequestURI()+" "+r.Header.Get("Cookie"))
		c.mu.Unlock()
		switch r.URL.Path {
		case api.PathEvents:
			w.Header().Set("Content-Type", "text/event-stream")
			for {
				http.NewResponseController(w).Flush()
				select {
				case s := <-c.lines:
					io.WriteString(w, s)
				case <-r.Context().Done():
					return
				}
			}
		case api.PathOverlays:
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, `{"error":"not for you"}`)
		default:
			w.Header().Set("Content-Type", "text/html")
			w.Header().Set("Set-Cookie", "of=coordinator")
			fmt.Fprintf(w, "this is %s", r.URL.RequestURI())
		}
	}))
	t.Cleanup(c.Close)
	return c
}

// opened serves a door until the test ends.
func opened(t *testing.T, c *coordinator, idle time.Duration) (link string, ended <-chan error, stop func()) {
	t.Helper()
	client, err := api.NewClient([]string{c.URL}, nil)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := door.New(door.Options{Client: client, Idle: idle, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Serve(ctx, l) }()
	t.Cleanup(cancel)
	return d.Link(l), done, cancel
}

// browser is a client that keeps cookies by hand.
type browser struct {
	t       *testing.T
	cookies []*http.Cookie
}

func (b *browser) do(method, url string, header ...string) (int, string, *http.Response) {
	b.t.Helper()
	req, err := http.NewRequestWithContext(b.t.Context(), method, url, nil)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, c := range b.cookies {
		req.AddCookie(c)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
		if header[i] == "Host" {
			req.Host = header[i+1]
		}
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		b.t.Fatal(err)
	}
	b.cookies = append(b.cookies, resp.Cookies()...)
	return resp.StatusCode, string(text), resp
}

func base(link string) string { return link[:strings.Index(link, "/open/")] }

func TestLinkWorksOnce(t *testing.T) {
	c := newCoordinator(t)
	link, _, _ := opened(t, c, time.Minute)
	at := base(link)
	if !strings.HasPrefix(link, "http://127.0.0.1:") || len(link) < len(at)+len("/open/")+20 {
		t.Fatalf("the link is %s", link)
	}
	stranger := &browser{t: t}
	if code, text, _ := stranger.do("GET", at+"/"); code != http.StatusUnauthorized || !strings.Contains(text, "overlayctl page") {
		t.Errorf("without the link: %d %s", code, text)
	}
	if code, _, _ := stranger.do("GET", link[:len(link)-1]+"x"); code != http.StatusForbidden {
		t.Errorf("another link: %d", code)
	}
	if code, _, _ := stranger.do("GET", link, "Sec-Purpose", "prefetch;prerender"); code != http.StatusServiceUnavailable {
		t.Errorf("prefetched: %d", code)
	}
	me := &browser{t: t}
	code, text, resp := me.do("GET", link)
	if code != http.StatusOK || !strings.Contains(text, "url=/") {
		t.Fatalf("the link: %d %s", code, text)
	}
	cookie := resp.Header.Get("Set-Cookie")
	for _, want := range []string{"HttpOnly", "SameSite=Strict", "Path=/"} {
		if !strings.Contains(cookie, want) {
			t.Errorf("the cookie is %s, without %s", cookie, want)
		}
	}
	if strings.Contains(cookie, "Domain") || strings.Contains(cookie, link[len(at)+6:]) {
		t.Errorf("the cookie is %s", cookie)
	}
	if code, text, resp := me.do("GET", at+"/"); code != http.StatusOK || text != "this is /" || resp.Header.Get("Set-Cookie") != "" || resp.Header.Get("Content-Security-Policy") == "" {
		t.Errorf("with the cookie: %d %s %v", code, text, resp.Header)
	}
	if code, text, _ := me.do("GET", at+"/v1/containers?q=a%26b&limit=5"); code != http.StatusOK || text != "this is /v1/containers?q=a%26b&limit=5" {
		t.Errorf("a query: %d %s", code, text)
	}
	if code, text, _ := me.do("GET", at+"/v1/overlays"); code != http.StatusForbidden || text != `{"error":"not for you"}` {
		t.Errorf("a refusal of the coordinator: %d %s", code, text)
	}
	if code, text, _ := stranger.do("GET", link); code != http.StatusForbidden || !strings.Contains(text, "used already") {
		t.Errorf("the link a second time: %d %s", code, text)
	}
	if code, _, _ := me.do("GET", link); code != http.StatusOK {
		t.Errorf("the link again, by who has the cookie: %d", code)
	}
	if len(stranger.cookies) > 0 {
		t.Errorf("who did not have the link got %v", stranger.cookies)
	}
	for _, a := range c.asked {
		if strings.Contains(a, "overlay-page") {
			t.Errorf("the coordinator got the cookie: %s", a)
		}
	}
}

// One of many that follow the link at once gets in.
func TestLinkAtOnce(t *testing.T) {
	link, _, _ := opened(t, newCoordinator(t), time.Minute)
	var got sync.Map
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			resp, err := http.Get(link)
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				got.Store(i, true)
			}
		})
	}
	all.Wait()
	n := 0
	got.Range(func(any, any) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d of 20 got in", n)
	}
}

func TestWhatPasses(t *testing.T) {
	c := newCoordinator(t)
	link, _, _ := opened(t, c, time.Minute)
	at := base(link)
	me := &browser{t: t}
	me.do("GET", link)
	before := len(c.asked)
	for _, tt := range []struct {
		method, path string
		code         int
		header       []string
	}{
		{"POST", "/v1/agents", 405, nil},
		{"DELETE", "/", 405, nil},
		{"HEAD", "/", 405, nil},
		{"GET", "/v1/backup", 404, nil},
		{"GET", "/v1/tokens", 404, nil},
		{"GET", "/metrics", 404, nil},
		{"GET", "/overlay-master/state", 404, nil},
		{"GET", "/v1/agents/../backup", 307, nil}, // to what is not served
		{"GET", "/", 421, []string{"Host", "evil.example"}},
		{"GET", "/", 421, []string{"Host", "127.0.0.1.evil.example:80"}},
		{"GET", "/", 421, []string{"Host", "10.0.0.1"}},
		{"GET", "/v1/agents", 403, []string{"Sec-Fetch-Site", "cross-site"}},
		{"GET", "/v1/agents", 403, []string{"Sec-Fetch-Site", "same-site"}}, // another port of this host
	} {
		if code, text, _ := me.do(tt.method, at+tt.path, tt.header...); code != tt.code {
			t.Errorf("%s %s %v: %d %s, want %d", tt.method, tt.path, tt.header, code, text, tt.code)
		}
	}
	if n := len(c.asked); n != before {
		t.Errorf("the coordinator was asked for %v", c.asked[before:])
	}
	for _, host := range []string{"localhost:8080", "127.0.0.1", "[::1]:80", "LOCALHOST"} {
		if code, text, _ := me.do("GET", at+"/", "Host", host); code != http.StatusOK {
			t.Errorf("Host %s: %d %s", host, code, text)
		}
	}
	if code, _, _ := me.do("GET", link, "Host", "evil.example"); code != http.StatusMisdirectedRequest {
		t.Errorf("the link under another name: %d", code)
	}
	if !slices.ContainsFunc(c.asked, func(s string) bool { return strings.HasPrefix(s, "GET / ") }) {
		t.Errorf("the coordinator was asked for %v", c.asked)
	}
}

// Events pass when they come, and keep the door open; without anybody it closes.
func TestStreamAndIdle(t *testing.T) {
	c := newCoordinator(t)
	const idle = 300 * time.Millisecond
	link, ended, _ := opened(t, c, idle)
	me := &browser{t: t}
	me.do("GET", link)
	req, err := http.NewRequestWithContext(t.Context(), "GET", base(link)+"/v1/events?after=7", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.AddCookie(me.cookies[0])
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	if resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Errorf("%v", resp.Header)
	}
	lines := bufio.NewReader(resp.Body)
	for began := time.Now(); time.Since(began) < 3*idle; {
		c.lines <- "data: 1\n\n"
		if s, err := lines.ReadString('\n'); err != nil || s != "data: 1\n" {
			t.Fatalf("%q, %v", s, err)
		}
		lines.ReadString('\n')
		time.Sleep(20 * time.Millisecond)
	}
	select {
	case err := <-ended:
		t.Fatalf("it ended while somebody looked: %v", err)
	default:
	}
	resp.Body.Close()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("it serves on with nobody there")
	}
}

// ctrl-C ends streams, too.
func TestInterrupted(t *testing.T) {
	c := newCoordinator(t)
	link, ended, stop := opened(t, c, time.Minute)
	me := &browser{t: t}
	me.do("GET", link)
	req, err := http.NewRequestWithContext(t.Context(), "GET", base(link)+"/v1/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.AddCookie(me.cookies[0])
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	began := time.Now()
	stop()
	if err := <-ended; err != nil || time.Since(began) > patience/4 {
		t.Errorf("it ended after %s: %v", time.Since(began), err)
	}
}

// A coordinator that is away is said, and half an answer is none.
func TestCoordinatorGone(t *testing.T) {
	c := newCoordinator(t)
	link, _, _ := opened(t, c, time.Minute)
	me := &browser{t: t}
	me.do("GET", link)
	c.Close()
	if code, text, _ := me.do("GET", base(link)+"/v1/agents"); code != http.StatusBadGateway || !strings.Contains(text, "no coordinator answers") {
		t.Errorf("%d %s", code, text)
	}
}
