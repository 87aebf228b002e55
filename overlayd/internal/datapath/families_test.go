package datapath

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// families are three hosts on one link: the first has IPv4 only, the second both,
// the third IPv6 only.
type families struct {
	n          network
	hosts      []*host
	peers      []conf.Peer
	containers [][]*netNS // by host and overlay
	addrs      [][]string
}

func addr6(i int) netip.Addr { return netip.MustParseAddr(fmt.Sprintf("fd00:1::%d", i+2)) }

func newFamilies(t *testing.T) *families {
	f := &families{n: bothIP}
	l := newLAN(t)
	for i := range 3 {
		p := f.n.Peer(i)
		p.TwoFamilies, p.MTU = true, 1450
		var addrs []string
		if i < 2 {
			addrs = append(addrs, p.AgentIP.String()+"/12")
		}
		if i > 0 {
			addrs = append(addrs, addr6(i).String()+"/64")
		}
		switch i {
		case 1:
			p.SecondIP, p.SecondMTU = addr6(i), 1430
		case 2:
			p.AgentIP, p.MTU = addr6(i), 1430
		}
		f.peers = append(f.peers, p)
		h := newHost(t, fmt.Sprint("h", i))
		l.plug(h.netNS, addrs...)
		f.hosts = append(f.hosts, h)
	}
	for i, h := range f.hosts {
		h.set(f.wanted(i), true)
	}
	for i, h := range f.hosts {
		var containers []*netNS
		var addrs []string
		for o := range f.n.Overlays {
			b := f.n.Host(i, 3).Bridges[2*o]
			c, a := h.container(b.Name, b.Addrs[0], 5)
			containers, addrs = append(containers, c), append(addrs, a)
		}
		f.containers, f.addrs = append(f.containers, containers), append(f.addrs, addrs)
	}
	return f
}

// wanted is what a host is given as things are.
func (f *families) wanted(i int) Host {
	c := f.n.Host(i, 3)
	c.VTEP.Local, c.VTEP.Second = f.peers[i].AgentIP, f.peers[i].SecondIP
	c.Seeking = !c.VTEP.Second.IsValid()
	c.Peers = nil
	for j, p := range f.peers {
		if j != i {
			c.Peers = append(c.Peers, p)
		}
	}
	return c
}

func (f *families) mustTalk(i, j int) {
	for o := range f.n.Overlays {
		f.containers[i][o].mustPing("", f.addrs[j][o])
		f.containers[j][o].mustPing("", f.addrs[i][o])
	}
}

// mustName checks that a host goes on, and says that it does not reach another.
func (f *families) mustName(i, j int) {
	f.hosts[i].t.Helper()
	r := f.hosts[i].set(f.wanted(i), true)
	said := strings.Join(r.Notices, "\n")
	for _, err := range r.Overlays {
		said += err.Error()
	}
	if r.Err != nil || !strings.Contains(said, fmt.Sprintf("%s at %s cannot be reached", f.peers[j].AgentID, f.peers[j].AgentIP)) {
		f.hosts[i].t.Errorf("host %d says of %d: %q, %v", i, j, said, r.Err)
	}
	for o := range f.n.Overlays {
		f.containers[i][o].mustNotPing("", f.addrs[j][o])
	}
}

// TestTwoFamilies: a host with an agent IP of each family reaches hosts of either, and
// they it; those that have none in common say so. Hosts and VTEPs are reached as well,
// no packet disappears for its size, and nothing is done twice.
func TestTwoFamilies(t *testing.T) { eachFirewall(t, testTwoFamilies) }

func testTwoFamilies(t *testing.T) {
	f := newFamilies(t)
	f.mustTalk(0, 1)
	f.mustTalk(1, 2)
	f.mustName(0, 2)
	f.mustName(2, 0)
	both := f.hosts[1]
	both.mustBeIdle(f.wanted(1))
	both.mustBeIdle(f.wanted(1)) // by a look
	for o, header := range []int{28, 48} {
		from, to := f.containers[1][o], f.addrs[2][o]
		if !from.pingsWhole(to, 1430-header) {
			t.Errorf("no packet of 1430 bytes arrives at %s", to)
		}
		out, _ := from.try(fmt.Sprintf("ping -n -c 2 -i 0.2 -W 1 -M do -s %d %s", 1450-header, to))
		if !strings.Contains(out, "mtu=1430") && !strings.Contains(out, "mtu = 1430") {
			t.Errorf("who sends 1450 bytes to %s is not told that 1430 is the most:\n%s", to, out)
		}
		both.mustPing("", to) // from the host, with its VTEP address
		f.hosts[2].mustPing("", f.addrs[1][o])
	}
	both.mustPing("", f.peers[2].VTEPIP.String())
	both.mustPing("", f.peers[2].VTEPIP6.String())
	f.hosts[2].mustPing("", f.peers[1].VTEPIP6.String())
	both.mustHave("ip -d link show "+mark.SecondVTEP, "local fd00:1::3", fmt.Sprint("id ", conf.VNI), fmt.Sprint("dstport ", conf.VXLANPort))
	f.hosts[0].mustNotHave("ip link", mark.SecondVTEP)
	f.hosts[2].mustNotHave("ip link", mark.SecondVTEP)
}

// TestSecondDeviceComesAndGoes: without its second address a host goes on with those
// of the first one's family, without a change to them, and takes the others up again
// when it is back. A peer that gets an address of the first family moves there.
func TestSecondDeviceComesAndGoes(t *testing.T) {
	f := newFamilies(t)
	both := f.hosts[1]
	f.mustTalk(1, 2)
	first := func() string {
		return both.sh("ip route show proto 44 dev vtep1024; ip -6 route show proto 44 dev vtep1024; ip neigh show dev vtep1024; bridge fdb show dev vtep1024; ip link show vtep1024")
	}
	before := first()

	both.sh("ip addr del fd00:1::3/64 dev eth0")
	f.mustName(1, 2)
	f.mustTalk(0, 1)
	both.mustNotHave("ip link", mark.SecondVTEP)
	both.mustNotHave("ip route", mark.SecondVTEP)
	both.mustNotHave("ip -6 route", mark.SecondVTEP)
	if after := first(); after != before {
		t.Errorf("what leads to the other family was changed:\n%s\nbefore:\n%s", after, before)
	}
	both.sh("ip addr add fd00:1::3/64 dev eth0 nodad")
	both.mustSet(f.wanted(1), true)
	f.mustTalk(1, 2)
	both.mustBeIdle(f.wanted(1))

	// Somebody removes what is ours.
	for _, loss := range []string{
		"ip link del " + mark.SecondVTEP, "ip link set " + mark.SecondVTEP + " down", "ip link del vtep1024",
		"ip neigh flush dev " + mark.SecondVTEP + " nud permanent", "ip route flush proto 44; ip -6 route flush proto 44",
		"ip addr flush dev vtep1024",
	} {
		both.sh(loss)
		both.mustSet(f.wanted(1), true)
		both.mustSet(f.wanted(1), true) // what the kernel took along
		both.mustBeIdle(f.wanted(1))
		f.mustTalk(1, 2)
		f.mustTalk(0, 1)
	}

	// The third host gets IPv4.
	f.hosts[2].sh("ip addr add 172.16.0.99/12 dev eth0")
	f.peers[2].SecondIP, f.peers[2].SecondMTU = netip.MustParseAddr("172.16.0.99"), 1430
	f.hosts[2].mustSet(f.wanted(2), true)
	if r, ok := both.update(f.wanted(1), f.peers[2]); !ok || r.Err != nil {
		t.Errorf("not by difference alone: %v", r.Err)
	}
	f.hosts[0].mustSet(f.wanted(0), true)
	for i := range f.hosts {
		f.hosts[i].mustBeIdle(f.wanted(i))
	}
	f.mustTalk(0, 2)
	f.mustTalk(1, 2)
	both.mustNotHave("ip route; ip -6 route; ip neigh show dev "+mark.SecondVTEP, "proto 44 dev "+mark.SecondVTEP)
}

// TestSecondDeviceIsRefused: where the kernel does not take the second device up, the
// host says so once and goes on as one without it: peers of its first family come by
// difference alone. It takes the others up again when it can.
func TestSecondDeviceIsRefused(t *testing.T) {
	f := newFamilies(t)
	both := f.hosts[1]
	var log bytes.Buffer
	both.dp.log = slog.New(slog.NewTextHandler(&log, nil))
	both.sh("ip link del " + mark.SecondVTEP)
	var holder net.PacketConn
	var err error
	both.do(func() { holder, err = net.ListenPacket("udp6", fmt.Sprintf("[::]:%d", conf.VXLANPort)) })
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	for i := range 4 {
		r := both.mustSet(f.wanted(1), true)
		if len(r.Notices) != 1 || !strings.Contains(r.Notices[0], fmt.Sprintf("UDP port %d is taken by", conf.VXLANPort)) {
			t.Errorf("notices are %q", r.Notices)
		}
		if i > 1 && r.Changed > 0 {
			t.Errorf("round %d changed %d objects", i, r.Changed)
		}
		p := f.n.Peer(5)
		p.TwoFamilies, p.MTU = true, 1450-i
		if r, ok := both.update(f.wanted(1), p); !ok || r.Err != nil || len(r.Notices) != 1 {
			t.Errorf("a peer of the first family does not come by difference: %v, %v, %q", ok, r.Err, r.Notices)
		}
		other := f.peers[2]
		other.MTU = 1300 + i
		if _, ok := both.update(f.wanted(1), other); ok {
			t.Error("what is behind the second device is believed to be there")
		}
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 {
		t.Errorf("it says so %d times:\n%s", n, log.String())
	}
	f.mustTalk(0, 1)
	holder.Close()
	both.mustSet(f.wanted(1), true)
	both.mustBeIdle(f.wanted(1))
	f.mustTalk(1, 2)
	if !strings.Contains(log.String(), "msg=recovered") {
		t.Errorf("it does not say that it is over:\n%s", log.String())
	}
}

// update changes one peer.
func (h *host) update(cfg Host, p conf.Peer) (r Report, ok bool) {
	h.t.Helper()
	h.do(func() { r, ok = h.dp.update(h.t.Context(), cfg, []conf.Peer{p}, nil, false) })
	return r, ok
}
