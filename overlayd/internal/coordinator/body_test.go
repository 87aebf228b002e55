package coordinator_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// Whoever does not send what it announced is answered, and let go, wherever it
// sends it; it holds a connection no longer than it may take.
func TestBodyThatDoesNotCome(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.SetBodyTimeout(50 * time.Millisecond)
	n.register(t, request("a", "10.0.0.1"))
	for name, tt := range map[string]struct {
		request, body string
		code          int
	}{
		"stops in the middle":     {"POST /v1/register", "{", http.StatusRequestTimeout},
		"wrong, then stops":       {"POST /v1/status", "}}}", http.StatusBadRequest},
		"nobody wants it":         {"GET /healthz", "", http.StatusOK},
		"wrong method":            {"PUT /v1/register", "x", http.StatusMethodNotAllowed},
		"nothing there":           {"POST /nothing", "", http.StatusNotFound},
		"watch that is refused":   {"GET /v1/watch?agent=unknown", "", http.StatusNotFound},
		"delete, without a start": {"POST /overlay-master/agents/delete", "", http.StatusRequestTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", strings.TrimPrefix(n.url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(patience / 3)); err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: coordinator\r\nContent-Length: 100\r\n\r\n%s", tt.request, tt.body)
			r := bufio.NewReader(conn)
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tt.code {
				t.Errorf("%s, want %d", resp.Status, tt.code)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Error(err)
			}
			if _, err := r.ReadByte(); err == nil || strings.Contains(err.Error(), "timeout") {
				t.Errorf("the connection is kept: %v", err)
			}
		})
	}

	// Who has sent everything may wait for longer than that.
	w := n.watch(t, "a", 0)
	w.next(t)
	n.register(t, request("b", "10.0.0.2"))
	w.next(t)
}
