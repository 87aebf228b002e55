package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// counters are a link's, of bytes and packets.
type counters struct{ Bytes, Packets float64 }

func (c counters) since(before counters) counters {
	return counters{c.Bytes - before.Bytes, c.Packets - before.Packets}
}

func (c counters) size() float64 { return c.Bytes / c.Packets }

// vtepCounters are those of what a host sent to others and got from them.
func vtepCounters(t *testing.T, h *lab.Host) (sent, got counters) {
	t.Helper()
	out, err := h.Run(t.Context(), "ip", "-s", "-j", "link", "show", "dev", "vtep1024")
	must(t, err)
	var links []struct {
		Stats64 struct{ RX, TX counters }
	}
	must(t, json.Unmarshal([]byte(out), &links))
	if len(links) != 1 {
		t.Fatalf("%d links called vtep1024", len(links))
	}
	return links[0].Stats64.TX, links[0].Stats64.RX
}

// transfer sends n bytes over TCP from one container to another.
func transfer(t *testing.T, from, to *lab.Container, n int64) {
	t.Helper()
	const port = 5001
	l, err := to.Listen(t.Context(), port)
	must(t, err)
	defer l.Close()
	received := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			received <- err
			return
		}
		defer conn.Close()
		got, err := io.Copy(io.Discard, conn)
		if err == nil && got != n {
			err = fmt.Errorf("%d bytes arrived, want %d", got, n)
		}
		received <- err
	}()
	conn, err := from.Dial(t.Context(), netip.AddrPortFrom(to.Addr(), port))
	must(t, err)
	must(t, conn.SetDeadline(time.Now().Add(30*time.Second)))
	_, err = io.CopyN(conn, zeroes{}, n)
	must(t, err)
	must(t, conn.Close())
	must(t, <-received)
}

type zeroes struct{}

func (zeroes) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// TestOffload: what containers send crosses both hosts in pieces of many
// packets, with checksums left to whoever needs them. Where one device on the
// way loses that, everything is cut into packets of the MTU, and bulk traffic is
// five times slower without anything being broken.
func TestOffload(t *testing.T) {
	o := options()
	o.Secure = true
	s := makeSeed(t, seedConfig(t), o)
	for _, h := range s.Agents {
		h.Datapath = "kernel" // what the fast path takes passes by the counters
	}
	must(t, s.Up(t.Context()))
	from, to := s.Agents[0], s.Agents[1]
	// size is the mean size of what leaves the one host and reaches the other.
	size := func(a, b *lab.Container) (sent, got float64) {
		t.Helper()
		sentBefore, _ := vtepCounters(t, from)
		_, gotBefore := vtepCounters(t, to)
		transfer(t, a, b, 32<<20)
		sentAfter, _ := vtepCounters(t, from)
		_, gotAfter := vtepCounters(t, to)
		return sentAfter.since(sentBefore).size(), gotAfter.since(gotBefore).size()
	}
	const large = 10_000
	var a, b *lab.Container
	for _, overlay := range []string{"dcos", "dcos6"} {
		for _, half := range []string{lab.Mesos, lab.Docker} {
			t.Run(overlay+"/"+half, func(t *testing.T) {
				var err error
				a, err = from.Attach(t.Context(), "bulk-"+overlay+"-"+half, overlay, half)
				must(t, err)
				b, err = to.Attach(t.Context(), "bulk-"+overlay+"-"+half, overlay, half)
				must(t, err)
				sent, got := size(a, b)
				t.Logf("%.0f bytes a packet sent, %.0f received", sent, got)
				if sent < large || got < large {
					t.Errorf("%.0f bytes a packet leave the one host and %.0f reach the other, want more than %d: offloads are lost", sent, got, large)
				}
			})
		}
	}
	// The same measure sees it when they are.
	_, err := from.Run(t.Context(), "ip", "link", "set", "dev", "vtep1024", "gso_max_segs", "1")
	must(t, err)
	if sent, _ := size(a, b); sent >= large {
		t.Errorf("%.0f bytes a packet without segmentation offload", sent)
	}
}
