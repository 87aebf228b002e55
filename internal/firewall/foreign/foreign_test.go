package foreign

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"
)

// What real rules of others stop is found, and what they let through is not.
func TestRead(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	host := Host{Devices: []string{"vtep1024", "m-dcos", "d-dcos"}, Subnets: []netip.Prefix{netip.MustParsePrefix("9.0.0.0/8")}}
	const table = "add table inet filter; add chain inet filter forward { type filter hook forward priority 0; policy drop; }; "
	const input = "add table inet f; add chain inet f in { type filter hook input priority 0; policy drop; }; "
	for i, tt := range []struct {
		name, script string
		want         []string // part of each finding; none: nothing is stopped
	}{
		{"nothing", "", nil},
		{"policy of FORWARD", "iptables-nft -P FORWARD DROP", []string{"iptables-nft: the policy of FORWARD is DROP"}},
		{"policy behind ours", "iptables-nft -P FORWARD DROP; iptables-nft -N OVERLAY-FORWARD; iptables-nft -A FORWARD -j OVERLAY-FORWARD", nil},
		{"legacy", "iptables-legacy -A FORWARD -j REJECT", []string{"see: iptables-legacy --list-rules FORWARD"}},
		{"IPv6 without an overlay that has it", "ip6tables-nft -P FORWARD DROP", nil},
		{"input", "iptables-nft -P INPUT DROP", []string{"no rule accepts UDP port 64000"}},
		{"input behind ours", "iptables-nft -P INPUT DROP; iptables-nft -N OVERLAY-INPUT; iptables-nft -A INPUT -j OVERLAY-INPUT; iptables-nft -A OVERLAY-INPUT -p udp --dport 64000 -j ACCEPT", nil},
		{"nftables", "nft '" + table + "'", []string{"chain forward of nftables' table inet filter drops what it does not accept, and accepts nothing of the overlay; see: nft list table inet filter"}},
		{"nftables by its last rule", "nft 'add table ip t; add chain ip t c { type filter hook forward priority 5; }; add rule ip t c ct state established accept; add rule ip t c counter reject'", []string{"table ip t"}},
		{"nftables that knows the devices", "nft '" + table + `add rule inet filter forward iifname "m-*" accept'`, nil},
		{"nftables that knows them by a set", "nft '" + table + `add rule inet filter forward iifname { "vtep1024", "d-dcos" } accept'`, nil},
		{"nftables that knows the range", "nft '" + table + `add rule inet filter forward ip saddr 9.0.0.0/8 accept'`, nil},
		{"nftables for others", "nft '" + table + `add rule inet filter forward iifname "eth0" ip saddr 10.0.0.0/8 accept'`, []string{"table inet filter"}},
		{"nftables input", "nft '" + input + "add rule inet f in tcp dport 22 accept'", []string{"has no rule for UDP port 64000"}},
		{"nftables input with the port", "nft '" + input + "add rule inet f in udp dport { 53, 64000 } accept'", nil},
		{"ours", "nft 'add table inet overlay; add chain inet overlay c { type filter hook forward priority 0; policy drop; }'", nil},
		{"another hook", "nft 'add table inet f; add chain inet f out { type filter hook output priority 0; policy drop; }'", nil},
		{"both", "iptables-nft -P FORWARD DROP; iptables-nft -P INPUT DROP; iptables-nft -N ufw-user-input", []string{"policy of FORWARD", "ufw is active and has no rule for UDP port 64000; see: ufw status verbose"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name := fmt.Sprintf("ovo-%d-%d", os.Getpid(), i)
			if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
				t.Fatalf("make a network namespace: %v\n%s", err, out)
			}
			t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
			var rules Rules
			err := ns.WithNetNSPath("/run/netns/"+name, func(ns.NetNS) error {
				if out, err := exec.Command("sh", "-ec", tt.script).CombinedOutput(); err != nil {
					return fmt.Errorf("%s: %w\n%s", tt.script, err, out)
				}
				rules = Read(t.Context())
				return nil
			})
			if err != nil || rules.Err != nil {
				t.Fatal(err, rules.Err)
			}
			found := rules.All(host)
			if len(found) != len(tt.want) {
				t.Fatalf("found %v, want %d", found, len(tt.want))
			}
			for i, f := range found {
				if !strings.Contains(f.String(), tt.want[i]) {
					t.Errorf("found %q, want %q", f, tt.want[i])
				}
			}
		})
	}
}
