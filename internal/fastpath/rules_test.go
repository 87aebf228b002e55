package fastpath

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// dockerRules are what dockerd makes, and Kubernetes' and CNI's portmap.
const dockerRules = `*filter
:FORWARD DROP
:DOCKER-USER -
:DOCKER-ISOLATION-STAGE-1 -
:DOCKER -
:OVERLAY-FORWARD -
-A FORWARD -j OVERLAY-FORWARD
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DROP
-A DOCKER-USER -j RETURN
-A OVERLAY-FORWARD -d 9.0.0.0/8 -i vtep1024 -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT
:POSTROUTING ACCEPT
:DOCKER -
:CNI-HOSTPORT-DNAT -
:CNI-HOSTPORT-MASQ -
:OVERLAY-MASQ -
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -j OVERLAY-MASQ
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
`

func forward(rules ...string) string {
	return "*filter\n:FORWARD ACCEPT\n:MINE -\n:OVERLAY-FORWARD -\n-A " + strings.Join(rules, "\n-A ") + "\n-A FORWARD -j OVERLAY-FORWARD\nCOMMIT\n"
}

// A rule of others that may see what the fast path would take is found; one that
// cannot is not.
func TestForeignRule(t *testing.T) {
	overlays := []netip.Prefix{netip.MustParsePrefix("9.0.0.0/8"), netip.MustParsePrefix("fd09::/32")}
	for _, tt := range []struct {
		name, rules string // for iptables-restore, or for nft
		found       string // words of it
	}{
		{"none", "", ""},
		{"Docker and portmap", dockerRules, ""},
		{"drop of all", forward("FORWARD -j DROP"), "-t filter -A FORWARD -j DROP"},
		{"drop of others", forward("FORWARD -s 10.0.0.0/8 -j DROP"), ""},
		{"drop of one container", forward("FORWARD -d 9.1.2.3/32 -p tcp -m tcp --dport 22 -j DROP"), "-d 9.1.2.3/32"},
		{"drop of all but others", forward("FORWARD ! -s 10.0.0.0/8 -j DROP"), "! -s 10.0.0.0/8"},
		{"drop of all but overlays", forward("FORWARD ! -s 9.0.0.0/8 -j DROP"), ""},
		{"by a bridge of ours", forward("FORWARD -i m-net -j LOG"), "-i m-net"},
		{"by bridges of ours", forward("FORWARD -i m+ -j LOG"), "-i m+"},
		{"by other devices", forward("FORWARD -i eth+ -j LOG"), ""},
		{"in a chain of theirs", forward("FORWARD -j MINE", "MINE -p udp -j REJECT"), "-A MINE -p udp -j REJECT"},
		{"in a chain not for us", forward("FORWARD -i eth0 -j MINE", "MINE -j REJECT"), ""},
		{"counting only", forward("FORWARD -p tcp"), ""},
		{"invalid", forward("FORWARD -m conntrack --ctstate INVALID -j DROP"), "--ctstate INVALID"},
		{"behind ours", "*filter\n:FORWARD DROP\n:OVERLAY-FORWARD -\n-A FORWARD -j OVERLAY-FORWARD\n-A FORWARD -j REJECT\nCOMMIT\n", ""},
		{"policy without ours", "*filter\n:FORWARD DROP\nCOMMIT\n", "-P FORWARD DROP"},
		{"clamped", "*mangle\n:FORWARD ACCEPT\n-A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu\nCOMMIT\n", ""},
		{"marked", "*mangle\n:PREROUTING ACCEPT\n-A PREROUTING -j MARK --set-mark 7\nCOMMIT\n", "--set-xmark 0x7"},
		{"not tracked", "*raw\n:PREROUTING ACCEPT\n-A PREROUTING -j CT --notrack\nCOMMIT\n", ""},
		{"translated", "*nat\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080\nCOMMIT\n", "-j REDIRECT"},
		{"virtual addresses", "*nat\n:PREROUTING ACCEPT\n-A PREROUTING -d 10.96.0.1/32 -p tcp -j DNAT --to-destination 9.1.2.3\nCOMMIT\n", ""},
		{"masqueraded", "*nat\n:POSTROUTING ACCEPT\n-A POSTROUTING -j MASQUERADE\nCOMMIT\n", "-j MASQUERADE"},
		{"masqueraded to itself", "*nat\n:POSTROUTING ACCEPT\n-A POSTROUTING -s 9.1.2.3/32 -d 9.1.2.3/32 -p tcp -m tcp --dport 80 -j MASQUERADE\nCOMMIT\n", ""},
		{"masqueraded to another", "*nat\n:POSTROUTING ACCEPT\n-A POSTROUTING -s 9.1.2.3/32 -d 9.1.2.4/32 -j MASQUERADE\nCOMMIT\n", "-d 9.1.2.4/32"},
		{"masqueraded to its network", "*nat\n:POSTROUTING ACCEPT\n-A POSTROUTING -s 9.1.2.0/24 -d 9.1.2.0/24 -j MASQUERADE\nCOMMIT\n", "-d 9.1.2.0/24"},
		{"masqueraded outside", "*nat\n:POSTROUTING ACCEPT\n-A POSTROUTING -o eth0 -j MASQUERADE\nCOMMIT\n", ""},

		{"the administrator's", "*filter\n:FORWARD ACCEPT\n:OVERLAY-FORWARD -\n:OVERLAY-USER -\n-A FORWARD -j OVERLAY-FORWARD\n-A OVERLAY-FORWARD -j OVERLAY-USER\n-A OVERLAY-USER -p tcp -m tcp --dport 22 -j DROP\nCOMMIT\n", "-A OVERLAY-USER"},
		{"nft: the administrator's", `table inet overlay { chain OVERLAY-USER { tcp dport 22 drop; }; chain f { type filter hook forward priority 0; jump OVERLAY-USER; }; }`, "OVERLAY-USER"},

		{"nft: for others", `table inet a { chain f { type filter hook forward priority 0; iifname "eth0" drop; ip saddr 10.0.0.0/8 drop; ip daddr { 10.1.2.3, 10.2.0.0/16 } counter drop; }; }`, ""},
		{"nft: drop", `table inet a { chain f { type filter hook forward priority 0; tcp dport 22 drop; }; }`, "chain f of table inet a at the hook forward"},
		{"nft: counting", `table inet a { chain f { type filter hook forward priority 0; counter; tcp dport 22 accept; }; }`, ""},
		{"nft: policy", `table inet a { chain f { type filter hook forward priority 0; policy drop; }; }`, "chain f"},
		{"nft: one container", `table ip6 a { chain f { type filter hook forward priority 0; ip6 daddr fd09::5 reject; }; }`, "table ip6 a"},
		{"nft: a chain of theirs", `table inet a { chain g { meta l4proto udp log; }; chain f { type filter hook forward priority 0; jump g; }; }`, "chain f"},
		{"nft: a set of theirs", `table inet a { set s { type ipv4_addr; }; chain f { type filter hook forward priority 0; ip saddr @s drop; }; }`, "chain f"},
		{"nft: a map", `table inet a { chain f { type filter hook forward priority 0; tcp dport vmap { 22 : drop }; }; }`, "chain f"},
		{"nft: to the host", `table inet a { chain p { type nat hook prerouting priority -100; fib daddr type local tcp dport 80 dnat ip to 10.0.0.1; }; }`, ""},
		{"nft: to itself", `table ip a { chain p { type nat hook postrouting priority 100; ip saddr 9.1.2.3 ip daddr 9.1.2.3 tcp dport 80 masquerade; }; }`, ""},
		{"nft: to another", `table ip a { chain p { type nat hook postrouting priority 100; ip saddr 9.1.2.3 ip daddr 9.1.2.4 masquerade; }; }`, "chain p"},
		{"nft: input", `table inet a { chain i { type filter hook input priority 0; drop; }; }`, ""},
		{"nft: bridge", `table bridge a { chain f { type filter hook forward priority 0; ether type arp drop; }; }`, "table bridge a"},
		{"nft: bridge, by a container", `table bridge a { chain f { type filter hook prerouting priority 0; iifname "vm0123456789ab" drop; }; }`, "table bridge a"},
		{"nft: bridge, by some containers", `table bridge a { chain f { type filter hook forward priority 0; oifname "vdab*" drop; }; }`, "table bridge a"},
		{"nft: bridge, by others", `table bridge a { chain f { type filter hook forward priority 0; iifname { "vmbr0", "veth0" } drop; oifname "vmbr*" drop; }; }`, ""},
		{"nft: bridge, to the gateway", `table bridge a { chain i { type filter hook input priority 0; ip daddr 9.1.2.3 drop; }; }`, "chain i of table bridge a at the hook input"},
		{"nft: bridge, from the gateway", `table bridge a { chain o { type filter hook output priority 0; oifname "vm0123456789ab" drop; }; }`, "chain o of table bridge a"},
		{"nft: ours", `table inet overlay { chain f { type filter hook forward priority 0; drop; }; }`, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSpace(t, "rules")
			flavours := [][]string{{"iptables-nft-restore"}, {"iptables-legacy-restore"}}
			if strings.HasPrefix(tt.name, "nft") {
				flavours = [][]string{{"nft", "-f", "-"}}
			}
			for _, restore := range flavours {
				s.feed(tt.rules, restore...)
				var found string
				err := s.ns.Inside(func() (err error) { found, err = ForeignRule(t.Context(), overlays); return err })
				if err != nil {
					t.Fatal(err)
				}
				if (found == "") != (tt.found == "") || !strings.Contains(found, tt.found) {
					t.Errorf("%s: found %q, want %q", restore[0], found, tt.found)
				}
				s.run("nft", "flush", "ruleset")
			}
		})
	}
}

// Without VXLAN what the fast path takes comes and goes by the underlay's devices, and
// a rule about those is about it.
func TestForeignRuleOfUnderlay(t *testing.T) {
	overlays := []netip.Prefix{netip.MustParsePrefix("9.0.0.0/8")}
	for _, tt := range []struct {
		rules string
		with  bool // is it a reason with eth0 as the underlay
	}{
		{forward("FORWARD -i eth0 -d 9.0.0.0/8 -p tcp -m tcp --dport 22 -j DROP"), true},
		{forward("FORWARD -o eth+ -j LOG"), true},
		{"*nat\n:POSTROUTING ACCEPT\n-A POSTROUTING -o eth0 -j MASQUERADE\nCOMMIT\n", true},
		{forward("FORWARD -i eth1 -j DROP"), false},
		{forward("FORWARD -i eth0 -d 10.0.0.0/8 -j DROP"), false},
		{`table inet a { chain f { type filter hook forward priority 0; iifname "eth0" tcp dport 22 drop; }; }`, true},
		{`table inet a { chain f { type filter hook forward priority 0; iifname "eth1" tcp dport 22 drop; }; }`, false},
	} {
		t.Run(tt.rules, func(t *testing.T) {
			s := newSpace(t, "under")
			if strings.HasPrefix(tt.rules, "table") {
				s.feed(tt.rules, "nft", "-f", "-")
			} else {
				s.feed(tt.rules, "iptables-nft-restore")
			}
			for _, underlay := range [][]string{nil, {"eth0"}} {
				var found string
				err := s.ns.Inside(func() (err error) { found, err = ForeignRule(t.Context(), overlays, underlay...); return err })
				if err != nil {
					t.Fatal(err)
				}
				if want := tt.with && underlay != nil; (found != "") != want {
					t.Errorf("underlay %v: found %q, want some: %v", underlay, found, want)
				}
			}
		})
	}
}

// Rules that no program of this host shows, as those that somebody in a container
// made, count as ones that matter.
func TestForeignRuleThatCannotBeRead(t *testing.T) {
	overlays := []netip.Prefix{netip.MustParsePrefix("9.0.0.0/8")}
	var programs []string
	for _, name := range []string{"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save", "nft"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		programs = append(programs, path)
	}
	for _, tt := range []struct {
		name, rules string
		missing     string // how the name of what is not installed begins
		found       string
	}{
		{"nothing installed, no rules", "", "", ""},
		{"a table", "nft 'add table inet a; add chain inet a f { type filter hook forward priority 0; }; add rule inet a f tcp dport 22 drop'", "", "table inet a of nftables"},
		{"a table, nft is missing", "nft 'add table inet a; add chain inet a f { type filter hook forward priority 0; }; add rule inet a f tcp dport 22 drop'", "nft", "table inet a of nftables"},
		{"a policy", "nft 'add table ip a; add chain ip a f { type filter hook forward priority 0; policy drop; }'", "nft", "table ip a of nftables"},
		{"an empty chain", "nft 'add table ip a; add chain ip a f { type filter hook forward priority 0; }; add chain ip a g; add rule ip a g drop'", "nft", ""},
		{"at another hook", "nft 'add table ip a; add chain ip a f { type filter hook input priority 0; }; add rule ip a f drop'", "nft", ""},
		{"at a bridge's", "nft 'add table bridge a; add chain bridge a f { type filter hook input priority 0; }; add rule bridge a f drop'", "nft", "table bridge a of nftables"},
		{"ours", "nft 'add table inet overlay; add chain inet overlay f { type filter hook forward priority 0; }; add rule inet overlay f drop'", "", ""},
		{"harmless ones of iptables", "iptables-nft -A FORWARD -s 10.0.0.0/8 -j DROP", "nft", ""},
		{"the same", "iptables-nft -A FORWARD -s 10.0.0.0/8 -j DROP", "", "table ip filter of nftables"},
		{"of the legacy flavour", "iptables-legacy -A FORWARD -s 9.1.2.3 -j DROP", "ip", "tables of iptables-legacy"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSpace(t, "unread")
			if tt.rules != "" {
				s.run("sh", "-c", tt.rules)
			}
			dir := t.TempDir()
			for _, path := range programs {
				if tt.missing != "" && !strings.HasPrefix(filepath.Base(path), tt.missing) {
					if err := os.Symlink(path, filepath.Join(dir, filepath.Base(path))); err != nil {
						t.Fatal(err)
					}
				}
			}
			path := os.Getenv("PATH")
			t.Setenv("PATH", dir)
			var found string
			err := s.ns.Inside(func() (err error) { found, err = ForeignRule(t.Context(), overlays); return err })
			t.Setenv("PATH", path)
			if err != nil {
				t.Fatal(err)
			}
			if (found == "") != (tt.found == "") || !strings.Contains(found, tt.found) {
				t.Errorf("found %q, want %q", found, tt.found)
			}
		})
	}
}

// A program that prints rules and does not end is not waited for.
func TestOutputThatDoesNotEnd(t *testing.T) {
	_, _, err := output(t.Context(), 100*time.Millisecond, "sleep", "600")
	if err == nil || !strings.Contains(err.Error(), "did not end within 100ms") {
		t.Error(err)
	}
}
