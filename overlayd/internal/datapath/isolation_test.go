package datapath

import (
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/fastpath"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan/plantest"
)

var update = flag.Bool("update", false, "write docs/isolation.md anew")

// modes are the columns of the table: how overlay A is configured. B has
// isolation overlay, but where A has none it has none as well.
var modes = []struct {
	name      string
	isolation conf.Isolation
	allow     bool // A allows B
}{
	{"none", conf.IsolationNone, false},
	{"overlay", conf.IsolationOverlay, false},
	{"strict", conf.IsolationStrict, false},
	{"overlay, allows B", conf.IsolationOverlay, true},
}

// setting is how a cluster of the test is set up.
type setting struct {
	firewall string
	direct   bool // without VXLAN where it can be
	fast     bool // with the fast path
	under6   bool // agent IPs are IPv6
}

func (s setting) String() string {
	return s.firewall + "," + map[bool]string{false: "vxlan", true: "direct"}[s.direct] + "," +
		map[bool]string{false: "kernel", true: "ebpf"}[s.fast] + map[bool]string{true: ",IPv6"}[s.under6]
}

// settings are all of them. What the fast path does, and what the family of the
// underlay changes, does not depend on who makes the rules.
func settings() (out []setting) {
	for _, firewall := range firewalls {
		for _, direct := range []bool{false, true} {
			out = append(out, setting{firewall: firewall, direct: direct})
		}
	}
	for _, direct := range []bool{false, true} {
		out = append(out, setting{firewall: "nftables", direct: direct, fast: true})
	}
	return append(out, setting{firewall: "nftables", direct: true, under6: true}, setting{firewall: "nftables", direct: true, fast: true, under6: true})
}

// place is a namespace with its address in one family.
type place struct {
	*netNS
	addr string
}

// attempt is a connection that somebody tries.
type attempt struct {
	row  string // of the table: attempts of one row have one outcome
	from *netNS
	to   string // address and port
	ping bool   // an echo request and no TCP connection
	ok   bool
}

// The ports of the test: where everybody listens, and where the first host
// publishes its containers of A and B.
const (
	listening  = "7000"
	publishedA = "7001"
	publishedB = "7002"
)

// matrix is a cluster of two hosts with containers of both halves of overlays A
// and B in both families, and a machine outside.
type matrix struct {
	t       *testing.T
	n       network
	hosts   []*host
	outside *netNS
	fast    []*fastpath.Path // of each host; nil: without
	at      map[string]place // by overlay, half, host and family: "A mesos 0 4"
}

// TestIsolationMatrix: who reaches whom, in every mode and every setting, in both
// families. The outcome is docs/isolation.md.
func TestIsolationMatrix(t *testing.T) {
	got := map[string]map[string]bool{} // by row and mode
	var rows []string
	for _, s := range settings() {
		t.Run(s.String(), func(t *testing.T) {
			useFirewall(t, s.firewall)
			m := newMatrix(t, s)
			for _, mode := range modes {
				m.configure(mode.isolation, mode.allow)
				for _, a := range m.try() {
					if got[a.row] == nil {
						got[a.row] = map[string]bool{}
						rows = append(rows, a.row)
					}
					if was, seen := got[a.row][mode.name]; seen && was != a.ok {
						t.Errorf("%s, mode %s: %v to %s (ping %v), but %v before", a.row, mode.name, a.ok, a.to, a.ping, was)
					}
					got[a.row][mode.name] = a.ok
				}
			}
			m.checkFast(s)
		})
	}
	want := table(rows, got)
	path := filepath.Join("..", "..", "..", "docs", "isolation.md")
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil || string(have) != want {
		t.Errorf("docs/isolation.md is not what was seen (%v); with -update it is written anew:\n%s", err, want)
	}
}

func newMatrix(t *testing.T, s setting) *matrix {
	m := &matrix{t: t, n: bothIP, at: map[string]place{}}
	m.n.Direct, m.n.Under6 = s.direct, s.under6
	m.n.Overlays = []Overlay{
		{Name: "a4", Subnets: []netip.Prefix{prefix("9.0.0.0/8")}}, {Name: "a6", Subnets: []netip.Prefix{prefix("fd01:b::/64")}},
		{Name: "b4", Subnets: []netip.Prefix{prefix("10.8.0.0/16")}}, {Name: "b6", Subnets: []netip.Prefix{prefix("fd02::/64")}},
	}
	l, hosts := m.n.plugHosts(t, 2)
	m.hosts = hosts
	m.outside = newNS(t, "out")
	l.plug(m.outside, "172.16.9.9/12", "fd00:9::9/64")
	m.outside.sh("ip route add fd00:1::/64 dev eth0") // where IPv6 agent IPs are
	for i, h := range hosts {
		if s.under6 {
			h.sh(fmt.Sprintf("ip addr add 172.16.0.%d/12 dev eth0", i+2))
		}
		h.sh(fmt.Sprintf("ip addr add fd00:9::%d/64 dev eth0 nodad; sysctl -qw net.ipv6.conf.all.forwarding=1", i+1))
		if s.fast {
			m.fast = append(m.fast, h.newFast())
		}
		for _, b := range m.n.Host(i, 2).Bridges {
			half := map[byte]string{'m': "mesos", 'd': "docker"}[b.Name[0]]
			c, port := h.attach(conf.Half(half), b.Overlay, b.Addrs[0], 5)
			addr := plantest.Nth(b.Addrs[0].Masked(), b.Addrs[0].Addr().BitLen(), 5).Addr().String()
			if published := i == 0 && half == "docker"; !published {
				h.sh(fmt.Sprintf("ip link set %s group %d", port, mark.FastPathGroup))
			}
			m.at[fmt.Sprintf("%s %s %d %c", strings.ToUpper(b.Overlay[:1]), half, i, b.Overlay[1])] = place{c, addr}
		}
	}
	for o := range m.n.Overlays {
		via := map[bool]string{false: "172.16.0.2", true: "fd00:9::1"}[o%2 == 1]
		m.outside.sh(fmt.Sprintf("ip route add %s via %s", m.n.AgentSubnet(m.n.Overlays[o], 0), via))
	}
	// Published ports, as a runtime makes them: by a table of its own.
	var dnat strings.Builder
	for _, f := range []struct{ family, nft string }{{"4", "ip"}, {"6", "ip6"}} {
		for port, to := range map[string]place{publishedA: m.at["A docker 0 "+f.family], publishedB: m.at["B docker 0 "+f.family]} {
			fmt.Fprintf(&dnat, "nft add rule inet published pre meta nfproto %s fib daddr type local tcp dport %s dnat %s to %s\n",
				map[string]string{"ip": "ipv4", "ip6": "ipv6"}[f.nft], port, f.nft, net.JoinHostPort(to.addr, listening))
		}
	}
	hosts[0].sh("nft 'add table inet published; add chain inet published pre { type nat hook prerouting priority dstnat; }'\n" + dnat.String())
	for _, p := range m.at {
		m.listen(p.netNS)
	}
	for _, n := range []*netNS{m.hosts[0].netNS, m.hosts[1].netNS, m.outside} {
		m.listen(n)
	}
	return m
}

func (m *matrix) listen(n *netNS) {
	m.t.Helper()
	var ln net.Listener
	var err error
	n.do(func() { ln, err = net.Listen("tcp", ":"+listening) })
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
}

func (m *matrix) configure(isolation conf.Isolation, allow bool) {
	for i := range m.n.Overlays {
		o := &m.n.Overlays[i]
		o.Isolation, o.Allow = isolation, nil
		if o.Name[0] == 'b' && isolation != conf.IsolationNone {
			o.Isolation = conf.IsolationOverlay
		}
		if o.Name[0] == 'a' && allow {
			o.Allow = []string{"b" + o.Name[1:]}
		}
	}
	for i, h := range m.hosts {
		c := m.n.Host(i, 2)
		h.mustSet(c, false)
		if m.fast != nil {
			h.applyFast(m.fast[i], c)
		}
	}
}

// newFast loads the fast path of a host.
func (h *host) newFast() (p *fastpath.Path) {
	h.t.Helper()
	var err error
	h.do(func() { p, err = fastpath.New(slog.New(slog.DiscardHandler)) })
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { p.Close() })
	return p
}

// applyFast tells the fast path of a host what the agent would.
func (h *host) applyFast(p *fastpath.Path, c Host) {
	h.t.Helper()
	w := fastpath.Wanted{Local: c.VTEP.Local, VTEPMAC: c.VTEP.MAC, Peers: c.Peers, Send: c.Direct.Send, Take: c.Direct.Take}
	for _, o := range c.Overlays {
		w.Overlays = append(w.Overlays, fastpath.Overlay{Name: o.Name, Subnets: o.Subnets})
	}
	var err error
	h.do(func() { err = p.Apply(h.t.Context(), w, true) })
	if err != nil {
		h.t.Fatal(err)
	}
}

// checkFast makes sure that the fast path had a part in it, and that packets
// without VXLAN were sent so.
func (m *matrix) checkFast(s setting) {
	m.t.Helper()
	for i, p := range m.fast {
		all, err := p.Traffic()
		if err != nil {
			m.t.Fatal(err)
		}
		for name, t := range all {
			if t.Out.Packets == 0 || t.In.Packets == 0 {
				m.t.Errorf("overlay %s: the fast path took nothing: %+v", name, t)
			}
			// On the first host one of the two has a published port.
			if near := t.Near.Packets > 0; near != (i == 1) {
				m.t.Errorf("overlay %s, host %d: the fast path took %+v between two containers of it", name, i, t.Near)
			}
		}
	}
	routes := len(m.hosts[0].lines("ip route show proto 44; ip -6 route show proto 44", "dev eth0"))
	if s.direct != (routes > 0) {
		m.t.Errorf("%d routes without VXLAN", routes)
	}
}

// try makes every attempt, all at the same time.
func (m *matrix) try() []*attempt {
	var all []*attempt
	add := func(from *netNS, to, port string, ping bool, format string, args ...any) {
		all = append(all, &attempt{row: fmt.Sprintf(format, args...), from: from, to: net.JoinHostPort(to, port), ping: ping})
	}
	for _, family := range []string{"4", "6"} {
		o := map[string]int{"A4": 0, "A6": 1, "B4": 2, "B6": 3}
		h0, h1 := m.n.Host(0, 2), m.n.Host(1, 2)
		vtep := func(h Host) string {
			if family == "6" {
				return h.VTEP.IP6.Addr().String()
			}
			return h.VTEP.IP.Addr().String()
		}
		underlay := func(i int) string {
			if m.n.AgentIP(i).Is6() == (family == "6") {
				return m.n.AgentIP(i).String()
			}
			return map[string]string{"4": fmt.Sprintf("172.16.0.%d", i+2), "6": fmt.Sprintf("fd00:9::%d", i+1)}[family]
		}
		// Hosts know the agent IPs of each other, and no other address.
		address := "an address but the agent IP"
		if m.n.Under6 == (family == "6") {
			address = "agent IP"
		}
		outside := map[string]string{"4": "172.16.9.9", "6": "fd00:9::9"}[family]
		for _, x := range []string{"A", "B"} {
			y := map[string]string{"A": "B", "B": "A"}[x]
			published := map[string]string{"A": publishedA, "B": publishedB}
			for _, half := range conf.Halves {
				from := m.at[fmt.Sprintf("%s %s 0 %s", x, half, family)].netNS
				for _, to := range []string{x, y} {
					for _, other := range conf.Halves {
						if to != x || other != half {
							for host := range m.hosts { // of the second no container is published
								at := func(overlay string, half conf.Half) place {
									return m.at[fmt.Sprintf("%s %s %d %s", overlay, half, host, family)]
								}
								add(at(x, half).netNS, at(to, other).addr, listening, false, "container of %s | container of %s, same host", x, to)
							}
						}
						add(from, m.at[fmt.Sprintf("%s %s 1 %s", to, other, family)].addr, listening, false, "container of %s | container of %s, other host", x, to)
					}
				}
				own := m.n.gateway(o[x+family], 0, half)
				add(from, own, listening, true, "container of %s | own gateway, ICMP", x)
				add(from, own, listening, false, "container of %s | own gateway, TCP", x)
				add(from, m.n.gateway(o[x+family], 1, half), listening, false, "container of %s | gateway of %s on the other host", x, x)
				add(from, m.n.gateway(o[y+family], 0, half), listening, false, "container of %s | gateway of %s, same host", x, y)
				add(from, m.n.gateway(o[y+family], 1, half), listening, false, "container of %s | gateway of %s on the other host", x, y)
				for i, h := range []Host{h0, h1} {
					which := []string{"own", "other"}[i]
					add(from, vtep(h), listening, false, "container of %s | VTEP address of the %s host", x, which)
					add(from, underlay(i), listening, false, "container of %s | %s of the %s host", x, address, which)
				}
				add(from, outside, listening, false, "container of %s | outside", x)
				for _, way := range []string{own, m.n.gateway(o[y+family], 0, half), vtep(h0)} {
					add(from, way, published[y], false, "container of %s | port of %s published by its own host, overlay address", x, y)
				}
				add(from, underlay(0), published[y], false, "container of %s | port of %s published by its own host, %s", x, y, address)
				far := m.at[fmt.Sprintf("%s %s 1 %s", x, half, family)].netNS
				for _, way := range []string{m.n.gateway(o[x+family], 0, half), m.n.gateway(o[y+family], 0, half), vtep(h0)} {
					add(far, way, published[y], false, "container of %s | port of %s published by another host, overlay address", x, y)
				}
				add(far, underlay(0), published[y], false, "container of %s | port of %s published by another host, %s", x, y, address)
				to := m.at[fmt.Sprintf("%s %s 0 %s", x, half, family)].addr
				add(m.hosts[0].netNS, to, listening, true, "its own host, ICMP | container of %s", x)
				add(m.hosts[0].netNS, to, listening, false, "its own host, TCP | container of %s", x)
				add(m.hosts[1].netNS, to, listening, false, "another host | container of %s", x)
				add(m.outside, to, listening, false, "outside, with a route | container of %s", x)
			}
			add(m.outside, underlay(0), published[x], false, "outside | published port of %s", x)
		}
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, 128)
	for _, a := range all {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			a.ok = a.works()
		})
	}
	wg.Wait()
	return all
}

// works tries twice what is refused: a busy machine may be slow.
func (a *attempt) works() bool {
	host, _, _ := net.SplitHostPort(a.to)
	for range 2 {
		ok := false
		if a.ping {
			ok = a.from.pings("", host)
		} else {
			a.from.do(func() {
				c, err := net.DialTimeout("tcp", a.to, 700*time.Millisecond)
				if ok = err == nil; ok {
					c.Close()
				}
			})
		}
		if ok {
			return true
		}
	}
	return false
}

// table is the page.
func table(rows []string, got map[string]map[string]bool) string {
	var b strings.Builder
	b.WriteString(`# Who reaches whom

Made by ` + "`go test ./overlayd/internal/datapath -run TestIsolationMatrix -update`" + `: two hosts, overlays A and B with containers in both halves, IPv4 and IPv6, a machine outside. Every cell was tried
with nftables, iptables-nft and iptables-legacy, in VXLAN and without (` + "`--routing direct`" + `), with nftables also on the fast path (` + "`--datapath ebpf`" + `) and over IPv6, in both families and from and to both halves, with the
same outcome; the test fails where it is another. The columns say how A is configured; B has ` + "`isolation: overlay`" + `, but in the column none.

The hosts of the test accept what they are not told to drop. Where theirs drop forwarded packets, "outside, with a route" is refused in every column. What [the modes mean](firewall.md#isolation).

| from | to |`)
	for _, m := range modes {
		fmt.Fprintf(&b, " %s |", m.name)
	}
	b.WriteString("\n|---|---|" + strings.Repeat("---|", len(modes)) + "\n")
	for _, r := range rows {
		fmt.Fprintf(&b, "| %s |", r)
		for _, m := range modes {
			fmt.Fprintf(&b, " %s |", map[bool]string{true: "yes", false: "-"}[got[r][m.name]])
		}
		b.WriteString("\n")
	}
	return b.String()
}
