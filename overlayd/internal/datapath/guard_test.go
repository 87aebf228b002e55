package datapath

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/firewall/nftables"
)

// VXLAN that no peer sent is not taken while others flush all rules again and
// again, nor while the agent is replaced by the next.
func TestVXLANDuringFlushes(t *testing.T) { eachFirewall(t, testVXLANDuringFlushes) }

func testVXLANDuringFlushes(t *testing.T) {
	n := onlyIPv4
	l, hosts := n.plugHosts(t, 2)
	stranger := newNS(t, "stranger")
	l.plug(stranger, "172.16.9.9/12")
	here, there := n.Host(0, 2), n.Host(1, 2)
	attacker, _ := hosts[0].container(here.Bridges[0].Name, here.Bridges[0].Addrs[0], 5)
	near, _ := hosts[1].container(there.Bridges[0].Name, there.Bridges[0].Addrs[0], 5)
	peer, from := hosts[0].container(here.Bridges[1].Name, here.Bridges[1].Addrs[0], 5)
	victim, addr := hosts[1].container(there.Bridges[1].Name, there.Bridges[1].Addrs[0], 5)
	peer.mustPing("", addr)
	var got net.PacketConn
	var err error
	victim.do(func() { got, err = net.ListenPacket("udp4", net.JoinHostPort(addr, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	to := got.LocalAddr().(*net.UDPAddr).AddrPort()
	packet := vxlanPacket(there.VTEP.MAC, netip.MustParseAddr(from), to, "injected")

	// attack has everybody inject while f runs, and afterwards until all is sent.
	attack := func(when string, f func()) {
		t.Helper()
		var senders sync.WaitGroup
		sent := make(chan struct{})
		more, enough := context.WithCancel(t.Context())
		defer enough()
		for name, a := range map[string]struct {
			ns *netNS
			to netip.Addr
		}{
			"stranger": {stranger, there.VTEP.Local}, "container": {attacker, there.VTEP.Local},
			"container of the host": {near, there.VTEP.Local}, "container, to the VTEP": {attacker, there.VTEP.IP.Addr()},
		} {
			senders.Go(func() {
				if err := injectSlowly(more, a.ns, netip.AddrPortFrom(a.to, conf.VXLANPort), packet); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			})
		}
		go func() { senders.Wait(); close(sent) }()
		rounds := 0
		for done := false; !done; {
			f()
			if rounds++; rounds == leastRounds {
				enough()
			}
			select {
			case <-sent:
				done = true
			default:
			}
		}
		for i, h := range hosts {
			h.mustSet(n.Host(i, 2), true)
		}
		peer.mustPing("", addr)
		sendUDP(t, peer, to, []byte("the end"))
		if err := got.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		delivered := 0
		for b := make([]byte, 100); ; {
			size, _, err := got.ReadFrom(b)
			if err != nil {
				t.Fatalf("%s: what a peer sends does not arrive: %v", when, err)
			}
			if string(b[:size]) == "the end" {
				break
			}
			delivered++
		}
		t.Logf("%s, %d times: %d of at least %d delivered", when, rounds, delivered, 4*injections)
		if delivered > 0 || rounds < leastRounds {
			t.Errorf("%s, %d times: %d of %d injected packets were delivered", when, rounds, delivered, 4*injections)
		}
	}
	attack("rules flushed", func() {
		for i, h := range hosts {
			h.sh("nft flush ruleset; for x in raw filter nat; do iptables -w -t $x -F; done; ipset flush")
			h.mustSet(n.Host(i, 2), true)
		}
	})
	attack("agent replaced", func() {
		for i, h := range hosts {
			h.dp.Close()
			h.dp = h.newDatapath()
			h.mustSet(n.Host(i, 2), false)
		}
	})
	if out := hosts[1].sh("nft list tables"); !strings.Contains(out, "table inet guard-overlay") {
		t.Errorf("the tables are %s", out)
	}
	// It goes with the last overlay and what is attached to it.
	for i, h := range hosts {
		none := Host{VTEP: n.Host(i, 2).VTEP}
		h.mustSet(none, true)
		h.mustHave("nft list chain inet guard-overlay OVERLAY-RAW", "udp dport", "drop")
		h.sh("for c in $(ip -o link show type veth | sed -n 's/^[0-9]*: \\(v[0-9]*\\)@.*/\\1/p'); do ip link del $c; done")
		h.mustSet(none, true)
		h.mustNotHave("nft list ruleset", "guard-overlay")
	}
}

// leastRounds is during how many flushes, or replacements, packets are injected.
const leastRounds = 5

// injectSlowly is inject with a pause after every hundred packets, and goes on until
// that is enough.
func injectSlowly(more context.Context, from *netNS, to netip.AddrPort, packet []byte) (err error) {
	from.do(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for i := 0; i < injections/100 || more.Err() == nil; i++ {
			var c net.Conn
			if c, err = net.Dial("udp", to.String()); err != nil {
				return
			}
			for range 100 {
				_, _ = c.Write(packet) // a full queue or an answer of ICMP is no reason to stop
			}
			c.Close()
			<-tick.C
		}
	})
	return err
}

// A table that another process has is left to it, and taken over when that ends.
func TestGuardOfAnother(t *testing.T) {
	n := onlyIPv4
	_, hosts := n.plugHosts(t, 1)
	h, cfg := hosts[0], n.Host(0, 3)
	h.mustSet(cfg, true)
	before := h.dp
	h.dp = h.newDatapath()
	h.mustSet(cfg, true)
	if h.dp.rules.guard.busy == nil {
		t.Error("two have the table")
	}
	const rules = "nft list table inet overlay 2>/dev/null || iptables -w -t raw -S"
	h.mustHave(rules, "OVERLAY-RAW") // which that table may not have
	before.Close()
	fewer := n.Host(0, 2)
	h.mustSet(fewer, true)
	if err := h.dp.rules.guard.busy; err != nil {
		t.Errorf("the table is not taken over: %v", err)
	}
	h.mustNotHave("nft list set inet guard-overlay peers4", n.AgentIP(2).String())
	h.mustHave("nft list set inet guard-overlay peers4", n.AgentIP(1).String())
	h.mustNotHave(rules, "OVERLAY-RAW") // it has it now
	h.mustHave("nft list chain inet guard-overlay OVERLAY-RAW", "saddr @ours4")
}

// A table of the guard's name that nobody may own, of a saved ruleset, is made anew:
// nobody else changes what it lets in.
func TestGuardOfASavedRuleset(t *testing.T) {
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h := hosts[0]
	if off := h.dp.rules.guard.off; off != nil {
		t.Skipf("this kernel has no such tables: %v", off)
	}
	h.dp.Close()
	h.sh("nft flush ruleset; nft add table inet guard-overlay; nft add chain inet guard-overlay OVERLAY-RAW '{ type filter hook prerouting priority -310; }'")
	h.sh("nft add rule inet guard-overlay OVERLAY-RAW udp dport 64000 drop")
	h.dp = h.newDatapath()
	cfg := onlyIPv4.Host(0, 2)
	h.mustSet(cfg, true)
	if off := h.dp.rules.guard.off; off != nil {
		t.Errorf("there is no guard: %v", off)
	}
	h.mustHave("nft list chain inet guard-overlay OVERLAY-RAW", "@peers4")
	h.mustBeIdle(cfg)
}

// beforeSet is a table before whose every Set a test looks.
type beforeSet struct {
	guardTable
	look func(r firewall.Ruleset)
}

func (b *beforeSet) Set(ctx context.Context, r firewall.Ruleset) (int, error) {
	b.look(r)
	return b.guardTable.Set(ctx, r)
}

// What the guard no longer does where peers send without VXLAN, the rules do before it
// ends; and what it begins to do they do until then.
func TestGuardWhenRoutingChanges(t *testing.T) { eachFirewall(t, testGuardWhenRoutingChanges) }

func testGuardWhenRoutingChanges(t *testing.T) {
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h, asked := hosts[0], 0
	if off := h.dp.rules.guard.off; off != nil {
		t.Skipf("this kernel has no such tables: %v", off)
	}
	h.dp.rules.guard.table = &beforeSet{h.dp.rules.guard.table, func(firewall.Ruleset) {
		asked++
		out, err := exec.Command("sh", "-c", "nft list chain inet overlay OVERLAY-RAW 2>/dev/null || iptables -w -t raw -S OVERLAY-RAW").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "ours") {
			t.Errorf("the guard is changed while the rules are: %s (%v)", out, err)
		}
	}}
	h.mustSet(directly(onlyIPv4).Host(0, 3), true)
	h.mustSet(onlyIPv4.Host(0, 3), true)
	if asked != 2 {
		t.Errorf("the guard was set %d times", asked)
	}
}

// Rules that a flush of nftables leaves keep VXLAN out without the guard, which goes
// with it while no agent runs.
func TestLegacyRulesWithoutGuard(t *testing.T) {
	useFirewall(t, "iptables-legacy")
	_, hosts := onlyIPv4.plugHosts(t, 1)
	h := hosts[0]
	h.dp.Close() // its table is flushed when it belongs to nobody
	h.sh("nft flush ruleset")
	h.mustHave("iptables -w -t raw -S OVERLAY-RAW", "--dport 64000", "-j DROP")
	h.mustHave("iptables -w -t raw -S OVERLAY-RAW", "overlay-ours4")
	h.mustHave("iptables -w -S OVERLAY-INPUT", "--dport 64000", "-j DROP")
	h.mustHave("iptables -w -S OVERLAY-FROM", "-j OVERLAY-ENCAP")
}

// A guard that cannot be made does not keep the rules away, and is named.
func TestRulesWithoutGuard(t *testing.T) { eachFirewall(t, testRulesWithoutGuard) }

func testRulesWithoutGuard(t *testing.T) {
	n := onlyIPv4
	_, hosts := n.plugHosts(t, 1)
	h, cfg := hosts[0], n.Host(0, 2)
	h.dp.Close() // its table belongs to nobody now
	h.sh("nft flush chain inet guard-overlay OVERLAY-INPUT; nft delete chain inet guard-overlay OVERLAY-INPUT")
	h.sh("nft 'add chain inet guard-overlay OVERLAY-INPUT { type nat hook input priority 0; }'")
	h.sh("nft delete table inet overlay 2>/dev/null || for x in raw filter nat; do iptables -w -t $x -F; done")
	h.dp = h.newDatapath()
	r := h.set(cfg, true)
	if r.Err == nil || !strings.Contains(r.Err.Error(), "guard the VXLAN port") {
		t.Errorf("the status is %v", r.Err)
	}
	h.mustHave("nft list table inet overlay 2>/dev/null || iptables -w -S FORWARD", "OVERLAY-FORWARD")
	h.sh("nft flush ruleset")
	h.mustSet(cfg, true)
	h.mustHave("nft list table inet guard-overlay", "hook input")
}

// withoutLimits is a table of a kernel that lacks what limits are made of: it
// refuses the transaction as that does, and makes every other one.
type withoutLimits struct {
	guardTable
	refused int
}

func (w *withoutLimits) Set(ctx context.Context, r firewall.Ruleset) (int, error) {
	for _, s := range r.Sets {
		if s.Limit != (firewall.Limit{}) {
			w.refused++
			return 0, fmt.Errorf("replace the rules: %w", unix.ENOENT)
		}
	}
	return w.guardTable.Set(ctx, r)
}

// A kernel that cannot bound what containers make the host resolve still keeps
// VXLAN of others out, and is named once.
func TestGuardWithoutBounds(t *testing.T) {
	n := onlyIPv4
	_, hosts := n.plugHosts(t, 1)
	h, cfg := hosts[0], n.Host(0, 2)
	if off := h.dp.rules.guard.off; off != nil {
		t.Skipf("this kernel has no such tables: %v", off)
	}
	h.dp.Close() // its table belongs to nobody now
	h.sh("nft flush ruleset")
	h.dp = h.newDatapath()
	var log bytes.Buffer
	h.dp.log = slog.New(slog.NewTextHandler(&log, nil))
	table := &withoutLimits{guardTable: nftables.NewGuard()}
	h.dp.rules.guard.table = table
	h.mustSet(cfg, true)
	h.mustHave("nft list chain inet guard-overlay OVERLAY-RAW", "udp dport", "drop")
	h.mustNotHave("nft list table inet guard-overlay", "OVERLAY-HOPS")
	h.mustBeIdle(cfg)
	if got := strings.Count(log.String(), "cannot bound"); got != 1 || table.refused != 1 {
		t.Errorf("named %d times, refused %d times, want once:\n%s", got, table.refused, log.String())
	}
}
