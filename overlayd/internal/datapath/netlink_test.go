package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Every refusal is told apart from its neighbours in the batch, with the
// kernel's own words, and the rest of the batch is obeyed.
func TestSendAttributesErrors(t *testing.T) {
	h := newHost(t, "h")
	const n = 900
	var m messages
	for i := range n {
		o := op{act: add, obj: routeTo, prefix: nth(prefix("9.0.0.0/8"), 24, i), metric: 5}
		if i%3 == 0 {
			o.addr = netip.MustParseAddr("44.128.0.9") // via a link that is not there
		}
		encodeRoute(&m, o, 4711)
	}
	var refused map[int]error
	var err error
	h.do(func() { refused, err = h.dp.conn.send(&m) })
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if got, want := refused[i] != nil, i%3 == 0; got != want {
			t.Fatalf("message %d: refused %v, want %v", i, refused[i], want)
		}
	}
	if !errors.Is(refused[0], unix.ENODEV) {
		t.Errorf("refused with %v, want %v", refused[0], unix.ENODEV)
	}
	if got := len(h.lines("ip route", "blackhole")); got != n*2/3 {
		t.Errorf("%d routes, want %d", got, n*2/3)
	}

	// Where the kernel says why, so do we.
	m.reset()
	encodeLink(&m, op{act: add, obj: bridgeLink, dev: "a name that is much too long"}, nil)
	h.do(func() { refused, err = h.dp.conn.send(&m) })
	if err != nil || refused[0] == nil || !strings.Contains(refused[0].Error(), "(") {
		t.Errorf("no sentence from the kernel: %v, %v", refused[0], err)
	}
}

// What could not be sent because the context ended is sent by the next Set.
func TestCancelled(t *testing.T) {
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h, cfg := hosts[0], onlyIPv4.config(0, 4)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, resync := range []bool{false, true} {
		var r Report
		h.do(func() { r = h.dp.Set(ctx, cfg, resync) })
		if !errors.Is(r.Err, context.Canceled) {
			t.Errorf("resync %t: %v", resync, r.Err)
		}
	}
	if r := h.mustSet(cfg, false); r.Changed != 3*4 {
		t.Errorf("%d objects changed, want 12", r.Changed)
	}
	h.mustBeIdle(cfg)
}

// Thousands of failures for one reason are not told one by one.
func TestReportIsShort(t *testing.T) {
	var all []problem
	for i := range 5000 {
		all = append(all, problem{"dcos", fmt.Errorf("route %d", i)}, problem{"", fmt.Errorf("neighbour %d", i)})
	}
	r := newReport(all, 1450, 0, errors.New("and stopped"))
	if got := r.Overlays["dcos"].Error(); strings.Count(got, "\n") != maxTold || !strings.HasSuffix(got, "and 4992 more") {
		t.Errorf("overlay: %s", got)
	}
	if got := r.Err.Error(); !strings.HasPrefix(got, "neighbour 0\n") || !strings.HasSuffix(got, "and 4992 more\nand stopped") {
		t.Errorf("host: %s", got)
	}
}
