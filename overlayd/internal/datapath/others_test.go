package datapath

import (
	"strings"
	"testing"
	"time"
)

// Rules of others that stop packets are announced, and named until they are gone.
func TestRulesOfOthers(t *testing.T) {
	useFirewall(t, "nftables")
	l := newLAN(t)
	h := newHost(t, "h")
	l.plug(h.netNS, "172.16.0.2/12")
	cfg := bothIP.Host(0, 2)
	if r := h.mustSet(cfg, true); len(r.Stopped) > 0 {
		t.Errorf("on a host without rules: %q", r.Stopped)
	}
	var changes <-chan struct{}
	h.do(func() { changes = h.dp.Changes(t.Context()) })
	const table = "table inet f; add chain inet f c { type filter hook forward priority 0; policy drop; }"
	for _, step := range []struct {
		script string
		says   []string
	}{
		{"iptables-nft -P FORWARD DROP; nft 'add " + table + "'", []string{"iptables-nft: the policy of FORWARD is DROP", "see: nft list table inet f"}},
		{"iptables-nft -P FORWARD ACCEPT; nft delete table inet f", nil},
	} {
		for quiet := false; !quiet; {
			select {
			case <-changes:
			case <-time.After(50 * time.Millisecond):
				quiet = true
			}
		}
		h.sh(step.script)
		deadline := time.After(2 * othersPause)
		for {
			var r Report
			select {
			case <-changes:
				r = h.mustSet(cfg, true)
			case <-deadline:
				t.Fatalf("%s: not announced, or nothing found", step.script)
			}
			found := 0
			for _, want := range step.says {
				if strings.Contains(strings.Join(r.Stopped, "\n"), want) {
					found++
				}
			}
			if found == len(step.says) && found == len(r.Stopped) {
				break
			}
		}
		if r := h.set(cfg, false); len(r.Stopped) != len(step.says) {
			t.Errorf("%s: without a look %q", step.script, r.Stopped)
		}
	}
	// An unwanted host has nothing to be stopped.
	h.sh("iptables-nft -P FORWARD DROP")
	if r := h.mustSet(Host{VTEP: cfg.VTEP}, true); len(r.Stopped) > 0 {
		t.Errorf("without overlays: %q", r.Stopped)
	}
}
