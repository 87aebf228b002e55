package firewall_test

import (
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall"
)

// What the kernel announces to nobody is found by asking: rules of the legacy
// flavour, sets of ipset.
func TestAltered(t *testing.T) {
	for _, kind := range []string{"iptables-legacy", "iptables-nft"} {
		t.Run(kind, func(t *testing.T) { testAltered(t, kind) })
	}
}

func testAltered(t *testing.T, kind string) {
	s := newSpace(t, kind)
	altered := func() (yes bool) {
		t.Helper()
		s.do(func() (err error) {
			yes, err = s.Altered()
			return err
		})
		return yes
	}
	if altered() {
		t.Error("altered before anything was set")
	}
	r := firewall.Build(config(3, 50, conf.IsolationOverlay))
	s.set(r)
	// Rules that count, elements of our own, and what others do elsewhere.
	s.sh(`ip link set lo up; ping -q -c 3 -i 0.01 127.0.0.1; ipset create other hash:ip; ipset add other 1.2.3.4`)
	if err := s.Elements(t.Context(), firewall.PeersSet, []firewall.Element{firewall.Address(config(1, 300, "").Peers[299])},
		[]firewall.Element{firewall.Address(config(1, 1, "").Peers[0])}); err != nil {
		t.Fatal(err)
	}
	if altered() {
		t.Error("altered though nobody did anything")
	}
	damages := []string{
		"ipset flush overlay-peers4", "ipset del overlay-overlays6 fd02:1::/64",
	}
	if kind == "iptables-legacy" {
		damages = append(damages, "iptables -F", "ip6tables -t raw -F", "iptables -t nat -F", "iptables -I FORWARD -j DROP",
			"iptables -P FORWARD DROP", "iptables -t raw -D OVERLAY-RAW 1", "ip6tables -R OVERLAY-TO 1 -j ACCEPT", "iptables -A OVERLAY-USER -s 1.2.3.4 -j DROP")
	}
	for _, damage := range damages {
		s.set(r)
		if altered() {
			t.Fatalf("altered right after Set, before %s", damage)
		}
		s.sh(damage)
		if !altered() {
			t.Errorf("after %s: not altered", damage)
		}
	}
	s.set(r)
	const times = 200
	began := time.Now()
	for range times {
		altered()
	}
	t.Logf("one question takes %v", time.Since(began)/times)
}
