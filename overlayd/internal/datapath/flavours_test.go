package datapath

import (
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
)

// Somebody has the name iptables lead to the other flavour, as update-alternatives
// does. What was made with the one before goes, and with it what it drops; the
// administrator's chain stays where it has rules.
func TestOtherFlavour(t *testing.T) {
	for _, tt := range []struct{ first, then string }{
		{"iptables-legacy", "iptables-nft"},
		{"iptables-nft", "iptables-legacy"},
		{"iptables-legacy", "nftables"},
		{"iptables-nft", "nftables"},
	} {
		for _, restart := range []bool{true, false} {
			name := tt.first + " to " + tt.then
			if restart {
				name += ", started again"
			}
			t.Run(name, func(t *testing.T) {
				if !restart && tt.then == "nftables" {
					return // takes a start
				}
				testOtherFlavour(t, tt.first, tt.then, restart)
			})
		}
	}
}

func testOtherFlavour(t *testing.T, first, then string, restart bool) {
	useFirewall(t, first)
	_, hosts := bothIP.plugHosts(t, 1)
	h, cfg := hosts[0], bothIP.Host(0, 1)
	strict := cfg
	strict.Overlays = append([]Overlay{}, cfg.Overlays...)
	strict.Overlays[0].Isolation = conf.IsolationStrict
	h.mustSet(strict, true)
	h.sh(first + " -A OVERLAY-USER -d 9.9.9.9 -j DROP")
	useFirewall(t, then)
	if restart {
		h.dp.Close()
		h.dp = h.newDatapath()
	}
	h.mustSet(cfg, true)
	h.mustBeIdle(cfg)
	for _, l := range h.lines(first+"-save; ip6"+strings.TrimPrefix(first, "ip")+"-save", "OVERLAY") {
		if !strings.Contains(l, "OVERLAY-USER") {
			t.Errorf("of %s is left: %s", first, l)
		}
	}
	h.mustHave(first+"-save", "-A OVERLAY-USER -d 9.9.9.9/32 -j DROP")
	h.mustNotHave("ipset list -n", "overlay-strict")
	c, _ := h.container(cfg.Bridges[0].Name, cfg.Bridges[0].Addrs[0], 5)
	c.mustPing("", cfg.VTEP.Local.String())

	none := Host{VTEP: cfg.VTEP}
	h.sh("ip link del " + cfg.Bridges[0].Name) // with the container
	h.mustSet(none, true)
	h.mustNotHave("ipset list -n", "overlay-")
}
