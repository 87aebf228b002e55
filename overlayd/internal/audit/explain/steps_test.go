package explain

import (
	"net/netip"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/audit"
)

// An overlay can be taken from under containers: they have addresses then that are in
// none of this host. Both walks stop at such a container.
func TestOverlayGone(t *testing.T) {
	conn, err := rtnl.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	addr := netip.MustParseAddr
	gone := end{name: "c1", addr: addr("9.0.1.130"), record: &ipam.Record{Attachment: conf.Attachment{ContainerID: "c1"}, Half: conf.Docker}}
	outside := end{name: "192.0.2.1", addr: addr("192.0.2.1")}
	here := end{name: "127.0.0.1", addr: addr("127.0.0.1")}
	for name, tt := range map[string]struct {
		a, b  end
		steps func(*walk)
	}{
		"from it":             {gone, outside, (*walk).there},
		"to it":               {here, gone, (*walk).there},
		"from it to its like": {gone, gone, (*walk).there},
		"to it from afar":     {outside, gone, (*walk).arrives},
	} {
		t.Run(name, func(t *testing.T) {
			w := &walk{ctx: t.Context(), conn: conn, a: tt.a, b: tt.b}
			tt.steps(w)
			if w.result.Reachable || !strings.Contains(w.result.StopsAt, "in no overlay of this host any more") {
				t.Errorf("%+v", w.result)
			}
		})
	}
}

// Not every address is one that packets can come from or go to.
func TestEndsThatAreNone(t *testing.T) {
	conn, err := rtnl.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	at := func(s string) end { return end{name: s, addr: netip.MustParseAddr(s)} }
	container := at("9.0.1.130")
	container.record = &ipam.Record{}
	for _, tt := range []struct {
		b    end
		from end
		want string
	}{
		{at("127.0.0.1"), container, "destination: 127.0.0.1 is the container itself"},
		{at("::1"), container, "destination: ::1 is the container itself"},
		{at("0.0.0.0"), container, "destination: 0.0.0.0 is nobody's address"},
		{at("::"), at("::1"), "destination: :: is nobody's address"},
		{at("127.0.0.1"), at("127.0.0.1"), ""},
	} {
		w := &walk{ctx: t.Context(), conn: conn, a: tt.from, b: tt.b}
		if w.outside(); !strings.HasPrefix(w.result.StopsAt, tt.want) || (tt.want == "") != (w.result.StopsAt == "") {
			t.Errorf("from %s to %s: %q, want %q", tt.from.addr, tt.b.addr, w.result.StopsAt, tt.want)
		}
	}
	w := &walk{ctx: t.Context(), conn: conn, a: at("192.0.2.1"), b: at("127.0.0.1")}
	if w.there(); !strings.HasPrefix(w.result.StopsAt, "source: 192.0.2.1 is in no overlay, and no address of this host") {
		t.Errorf("from the outside: %+v", w.result)
	}
}

// What another host sends is looked at there, also what it sends itself.
func TestSender(t *testing.T) {
	conn, err := rtnl.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	addr := netip.MustParseAddr
	w := &walk{conn: conn, books: audit.Host{}, peers: []conf.Peer{
		{AgentIP: addr("192.0.2.7"), VTEPIP: addr("44.128.0.7")},
		{AgentIP: addr("192.0.2.8"), VTEPIP6: addr("fd01:a::8"), Underlay: conf.Underlay{SecondIP: addr("2001:db8::8")}},
	}}
	for from, want := range map[string]string{
		"192.0.2.7": "192.0.2.7", "44.128.0.7": "192.0.2.7", "fd01:a::8": "192.0.2.8", "2001:db8::8": "192.0.2.8",
		"127.0.0.1": "", "192.0.2.9": "",
	} {
		w.a = end{addr: addr(from)}
		got := ""
		if p := w.sender(); p != nil {
			got = p.AgentIP.String()
		}
		if got != want {
			t.Errorf("%s is sent by %q, want %q", from, got, want)
		}
	}
}
