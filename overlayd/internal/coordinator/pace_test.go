package coordinator_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// manyOverlays make a peer so large that a few of them fill the buffers between
// a stream and its reader.
func manyOverlays() string {
	var overlays []string
	for i := range 100 {
		overlays = append(overlays, fmt.Sprintf(
			`{"name": "o%d", "subnet": "9.%d.0.0/16", "prefix": 24, "subnet6": "fd01:b:%x::/64", "prefix6": 80}`, i, i, i))
	}
	return `{"vtep_subnet": "44.128.0.0/20", "vtep_subnet6": "fd01:a::/64", "vtep_mac_oui": "70:B3:D5:00:00:00",
		"overlays": [` + strings.Join(overlays, ", ") + `]}`
}

// smallBuffer is for the Control of a listener or a dialer.
func smallBuffer(option int) func(_, _ string, raw syscall.RawConn) error {
	return func(_, _ string, raw syscall.RawConn) (err error) {
		outer := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, option, 16<<10) })
		return errors.Join(outer, err)
	}
}

// slowPeers is how many agents smallStream registers.
const slowPeers = 30

// smallStream serves a coordinator with some agents and returns it and what the
// first of them is sent: its snapshot, of which more than the first bytes does
// not come before they are read.
func smallStream(t *testing.T, timeout time.Duration, rate int) (*node, *bufio.Reader) {
	t.Helper()
	n := start(t, newStore(t), manyOverlays())
	n.SetPace(timeout, rate)
	for i := range slowPeers {
		n.register(t, nth(i))
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	listen := net.ListenConfig{Control: smallBuffer(unix.SO_SNDBUF)} // connections inherit it
	l, err := listen.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- n.Serve(ctx, l) }()
	dial := net.Dialer{Control: smallBuffer(unix.SO_RCVBUF)}
	conn, err := dial.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET %s?agent=%s HTTP/1.1\r\nHost: coordinator\r\n\r\n", api.PathWatch, nth(0).AgentID)
	resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 1<<10), nil)
	if err != nil {
		t.Fatal(err)
	}
	body := bufio.NewReaderSize(resp.Body, 1<<10)
	if _, err := body.Peek(1); err != nil {
		t.Fatal(err)
	}
	return n, body
}

func (n *node) connected(id string) bool {
	for _, a := range n.Agents() {
		if a.AgentID == id {
			return a.Connected
		}
	}
	return false
}

// A stream whose reader does not read ends when its time is over: what it was
// to read is not kept for ever.
func TestReaderThatDoesNotRead(t *testing.T) {
	n, body := smallStream(t, 100*time.Millisecond, 1<<20)
	eventually(t, "the stream has ended", func() bool { return !n.connected(nth(0).AgentID) })
	if line, err := body.ReadBytes('\n'); err == nil {
		t.Errorf("a line of %d bytes came through all the same", len(line))
	}
}

// A reader that takes longer than the timeout, and less than the size of the
// message allows, gets all of it.
func TestReaderThatIsSlow(t *testing.T) {
	const timeout = 500 * time.Millisecond
	n, body := smallStream(t, timeout, 16<<10)
	<-time.After(timeout + timeout/2)
	line, err := body.ReadBytes('\n')
	if err != nil {
		t.Fatalf("cut after %d bytes: %v", len(line), err)
	}
	var e api.PeerEvent
	if err := json.Unmarshal(line, &e); err != nil || len(e.Put) != slowPeers {
		t.Errorf("%d peers, %v; want %d", len(e.Put), err, slowPeers)
	}
	if len(line) < 96<<10 {
		t.Errorf("the snapshot has %d bytes, too few to wait for the reader", len(line))
	}
	if !n.connected(nth(0).AgentID) {
		t.Error("the stream has ended")
	}
}
