package serve_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/overlayd/internal/serve"
)

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

func testAPI(log *slog.Logger) serve.API {
	return serve.API{
		Name: "a test",
		Log:  log,
		Routes: []serve.Route{
			{Method: http.MethodGet, Path: "/", Handler: func(w http.ResponseWriter, _ *http.Request) error {
				serve.WriteJSON(w, http.StatusOK, "home")
				return nil
			}},
			{Method: http.MethodPost, Path: "/echo", Handler: func(w http.ResponseWriter, r *http.Request) error {
				var v any
				if err := serve.ReadJSON(w, r, &v); err != nil {
					return err
				}
				serve.WriteJSON(w, http.StatusOK, v)
				return nil
			}},
			{Method: http.MethodGet, Path: "/echo", Handler: func(http.ResponseWriter, *http.Request) error { return io.ErrUnexpectedEOF }},
			{Method: http.MethodGet, Path: "/panic", Handler: func(http.ResponseWriter, *http.Request) error { panic("on purpose") }},
			{Method: http.MethodGet, Path: "/busy", Handler: func(http.ResponseWriter, *http.Request) error { return context.DeadlineExceeded }},
		},
		Code: func(err error) int {
			if errors.Is(err, context.DeadlineExceeded) {
				return http.StatusServiceUnavailable
			}
			return 0
		},
	}
}

func TestAnswers(t *testing.T) {
	var log bytes.Buffer
	api := testAPI(slog.New(slog.NewTextHandler(&log, nil)))
	api.Allow = func(_ http.ResponseWriter, r *http.Request, route *serve.Route) (*http.Request, error) {
		if r.Header.Get("Deny") != "" {
			return nil, serve.Refuse(http.StatusUnauthorized, "denied, there is a route: %v", route != nil)
		}
		return r, nil
	}
	h := api.Handler()
	for _, tt := range []struct {
		method, path, body, deny string
		code                     int
		want                     string
	}{
		{"GET", "/", "", "", 200, `"home"`},
		{"HEAD", "/", "", "", 200, ``},
		{"POST", "/echo", `{"a": 1}`, "", 200, `{"a":1}`},
		{"POST", "/echo", `{"a": 1} 2`, "", 400, "more after the first"},
		{"POST", "/echo", ``, "", 400, "the body is empty"},
		{"POST", "/echo", `{`, "", 400, "cannot be read as JSON"},
		{"POST", "/echo", `"` + strings.Repeat("x", serve.MaxBody) + `"`, "", 413, "more than 1048576 bytes"},
		{"PUT", "/echo", "", "", 405, "only POST and GET is served here"},
		{"GET", "/echo", "", "", 500, "unexpected EOF"},
		{"GET", "/busy", "", "", 503, "deadline"},
		{"GET", "/panic", "", "", 500, "the log of a test has it"},
		{"GET", "/elsewhere", "", "", 404, `there is nothing at \"/elsewhere\"; this is a test and serves: GET /, POST /echo`},
		{"GET", "/elsewhere", "", "1", 401, "there is a route: false"},
		{"PUT", "/echo", "", "1", 401, "there is a route: true"},
	} {
		r := httptest.NewRequest(tt.method, tt.path, strings.NewReader(tt.body))
		r.Header.Set("Deny", tt.deny)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != tt.code || !strings.Contains(w.Body.String(), tt.want) {
			t.Errorf("%s %s: %d %s, want %d with %s", tt.method, tt.path, w.Code, w.Body, tt.code, tt.want)
		}
		if w.Code >= 300 && !strings.HasPrefix(w.Body.String(), `{"error":`) {
			t.Errorf("%s %s: the refusal is %s", tt.method, tt.path, w.Body)
		}
	}
	if !strings.Contains(log.String(), "on purpose") {
		t.Errorf("the panic is not in the log:\n%s", &log)
	}
}

// running serves until the test ends, and returns the address.
func running(t *testing.T, s serve.Server) string {
	t.Helper()
	l, err := serve.ListenTCP(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if s.Handler == nil {
		s.Handler = testAPI(slog.New(slog.DiscardHandler)).Handler()
	}
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	s.HeaderTimeout, s.IdleTimeout, s.Grace = patience, patience, time.Second
	until(t, func(ctx context.Context) error { return s.Serve(ctx, l) })
	return l.Addr().String()
}

// until runs f until the test ends.
func until(t *testing.T, f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
	}
}

// serverCert is one that httptest made.
func serverCert(t *testing.T) tls.Certificate {
	s := httptest.NewTLSServer(nil)
	defer s.Close()
	return s.TLS.Certificates[0]
}

// The kernel gives up silent connections whether or not TLS is spoken on them,
// and HTTP/2 is never chosen.
func TestSilenceIsLimitedUnderTLS(t *testing.T) {
	limits := make(chan [3]int, 1)
	s := serve.Server{TLS: &tls.Config{Certificates: []tls.Certificate{serverCert(t)}, NextProtos: []string{"h2", "http/1.1"}}}
	s.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if encrypted, ok := c.(*tls.Conn); ok {
			c = encrypted.NetConn()
		} else {
			t.Errorf("the connection is a %T", c)
		}
		raw, err := c.(syscall.Conn).SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) {
				keep, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE)
				idle, _ := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_KEEPIDLE)
				silent, _ := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
				limits <- [3]int{keep, idle, silent}
			})
		}
		if err != nil {
			t.Error(err)
		}
		return ctx
	}
	addr := running(t, s)
	transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Get("https://" + addr + "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.ProtoMajor != 1 {
		t.Errorf("the server speaks %s", resp.Proto)
	}
	if got := <-limits; got != [3]int{1, 15, 15000} {
		t.Errorf("keepalive, idle time and user timeout are %v", got)
	}
}

// Connections above the limit are closed at once; the others go on, and what
// ends makes room.
func TestConnectionLimit(t *testing.T) {
	addr := running(t, serve.Server{MaxConns: 3})
	var conns []net.Conn
	ask := func(c net.Conn) error {
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		return err
	}
	dial := func() net.Conn {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	for range 3 {
		c := dial()
		if err := ask(c); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	if err := ask(dial()); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a fourth connection: %v, want it closed", err)
	}
	for _, c := range conns {
		if err := ask(c); err != nil {
			t.Errorf("one of the three: %v", err)
		}
	}
	conns[0].Close()
	eventually(t, "room for another", func() bool { return ask(dial()) == nil })
}

func TestSocket(t *testing.T) {
	dir := t.TempDir()
	// Too long a path for a socket's address, before it has its name.
	dir = filepath.Join(dir, strings.Repeat("d", serve.MaxSocketPath-len(dir)-len("/s.sock")-1))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	defer syscall.Umask(syscall.Umask(0))
	socket := serve.Socket{Path: filepath.Join(dir, "s.sock"), Perm: 0o640, Group: 12345, Look: time.Millisecond}
	l, err := socket.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Lstat(socket.Path)
	if err != nil {
		t.Fatal(err)
	}
	if st := fi.Sys().(*syscall.Stat_t); fi.Mode() != os.ModeSocket|0o640 || st.Gid != 12345 {
		t.Errorf("mode %v, group %d", fi.Mode(), st.Gid)
	}
	if _, err := socket.Listen(t.Context()); err == nil || !strings.Contains(err.Error(), "does a second daemon run") {
		t.Errorf("a second one: %v", err)
	}
	l.UnixListener.Close() // as a process that was killed
	if l, err = socket.Listen(t.Context()); err != nil {
		t.Fatalf("after a crash: %v", err)
	}
	if err := errors.Join(l.Close(), os.WriteFile(socket.Path, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err = socket.Listen(t.Context()); err == nil || !strings.Contains(err.Error(), "is not a socket; move it away") {
		t.Errorf("a file: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// A socket that somebody removes comes back, with its directory too, and goes
// when the server ends.
func TestSocketIsKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	socket := serve.Socket{Path: filepath.Join(dir, "s.sock"), Perm: 0o600, Look: time.Millisecond}
	l, err := socket.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s := serve.Server{Handler: testAPI(slog.New(slog.DiscardHandler)).Handler(), Log: slog.New(slog.DiscardHandler), Grace: time.Second}
	ctx, cancel := context.WithCancel(t.Context())
	var ended sync.WaitGroup
	ended.Go(func() {
		if err := s.ServeSocket(ctx, l); err != nil {
			t.Error(err)
		}
	})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket.Path)
	}}}
	answers := func() bool {
		resp, err := client.Get("http://socket/")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	}
	eventually(t, "an answer", answers)
	if err := os.Remove(socket.Path); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an answer on a new socket", answers)
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "an answer in a new directory", answers)
	cancel()
	ended.Wait()
	if _, err := os.Lstat(socket.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket after the end: %v", err)
	}
}
