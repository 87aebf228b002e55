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
	host := Host{Devices: []string{"vtep1024", "m-dcos", "d-dcos"}, Subnets: []netip.Prefix{netip.MustParsePrefix("9.0.0.0/8")}, Underlay4: true}
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
			must(t, rules.All(host), tt.want)
		})
	}
}

// must checks that each finding has a text in it.
func must(t *testing.T, found []Finding, want []string) {
	t.Helper()
	if len(found) != len(want) {
		t.Fatalf("found %v, want %d", found, len(want))
	}
	for i, f := range found {
		if !strings.Contains(f.String(), want[i]) {
			t.Errorf("found %q, want %q", f, want[i])
		}
	}
}

// What keeps VXLAN out is found in the rules of each family that it comes by.
func TestFamilies(t *testing.T) {
	drop := func(command string) Ruleset { return Parse(command, "*filter\n:INPUT DROP [0:0]\n") }
	rules := Rules{
		Sets:   []Ruleset{drop("iptables-nft"), drop("ip6tables-nft")},
		Chains: []Chain{{Family: "ip", Table: "four", Name: "in", Hook: "input"}, {Family: "ip6", Table: "six", Name: "in", Hook: "input"}, {Family: "inet", Table: "all", Name: "in", Hook: "input"}},
	}
	four, six := []string{"iptables-nft: the policy", "table ip four", "table inet all"}, []string{"ip6tables-nft: the policy", "table ip6 six", "table inet all"}
	must(t, rules.Input(Host{Underlay4: true}), four)
	must(t, rules.Input(Host{Underlay6: true}), six)
	must(t, rules.Input(Host{Underlay4: true, Underlay6: true}), []string{four[0], six[0], four[1], six[1], four[2]})

	rules = Rules{Sets: []Ruleset{
		Parse("iptables-nft", "*filter\n:ufw-user-input - [0:0]\n"), Parse("ip6tables-nft", "*filter\n:ufw6-user-input - [0:0]\n"),
	}}
	must(t, rules.UFW(Host{Underlay4: true, Underlay6: true}), []string{"iptables-nft: ufw", "ip6tables-nft: ufw"})
	must(t, rules.UFW(Host{Underlay6: true}), []string{"ip6tables-nft: ufw"})
}

// The command that is proposed is one of nft, and lets all devices through.
func TestFixNamesDevices(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	const table = "add table inet filter; add chain inet filter forward { type filter hook forward priority 0; policy drop; }"
	host := Host{Devices: []string{"vtep1024", "vtep1024-2", "m-dcos", "d-dcos", "m-other"}, Underlay4: true, Underlay6: true}
	name := fmt.Sprintf("ovo-%d-fix", os.Getpid())
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		t.Fatalf("make a network namespace: %v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	err := ns.WithNetNSPath("/run/netns/"+name, func(ns.NetNS) error {
		if out, err := exec.Command("nft", table).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		found := Read(t.Context()).Forward(host)
		if len(found) != 1 {
			return fmt.Errorf("found %v, want one", found)
		}
		fix, _, _ := strings.Cut(found[0].Fix, ", and the same")
		if out, err := exec.Command("sh", "-ec", fix).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", fix, err, out)
		}
		if !strings.Contains(fix, `'{ "vtep1024", "vtep1024-2", "m-*", "d-*" }'`) {
			t.Errorf("the fix is %s", fix)
		}
		if found := Read(t.Context()).Forward(host); len(found) > 0 {
			t.Errorf("the fix is not enough: %v", found)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
