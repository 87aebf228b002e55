package repair

import (
	"regexp"
	"slices"
	"strings"
)

// parts print what a host has, one thing a line, as far as it is the agent's.
var parts = map[string]string{
	"links":      `ip -d -o link show type vxlan; ip -d -o link show type bridge; ip -d -o link show type veth`,
	"ports":      `bridge -d -o link show; ip -o link show type veth`,
	"addresses":  `ip -o addr show scope global`,
	"routes":     `ip route show table all; ip -6 route show table all`,
	"ip rules":   `ip rule show; ip -6 rule show`,
	"neighbours": `ip neigh show dev vtep1024 nud permanent; ip -6 neigh show dev vtep1024 nud permanent`,
	"fdb":        `bridge fdb show dev vtep1024`,
	"sysctls": `cd /proc/sys/net
grep . ipv4/ip_forward ipv6/conf/all/forwarding
for d in vtep1024 m-dcos d-dcos m-dcos6 d-dcos6; do for k in forwarding rp_filter promote_secondaries; do grep -H . ipv4/conf/$d/$k; done
for k in accept_ra autoconf accept_redirects disable_ipv6 forwarding accept_dad; do grep -H . ipv6/conf/$d/$k; done; done`,
	// Without what the kernel itself puts into sets.
	"rules": `nft -s list ruleset | awk '/^\tset /{own=0} /flags dynamic/{own=1} own && /elements = /{skip=1} !skip{print} skip && /}/{skip=0}'; ipset save; for p in iptables-legacy ip6tables-legacy; do $p-save; done`,
}

// everyPart is the names of the parts.
func everyPart() []string {
	var out []string
	for name := range parts {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

// changing is what becomes another by itself, or when a device is made anew.
var changing = regexp.MustCompile(`^\d+: |@if\d+|link-netnsid \d+|(hello|tcn|topology_change|gc)_timer +[\d.]+|\[\d+:\d+\]|^#.*|\bdadfailed\b|\blinkdown\b|valid_lft \S+|preferred_lft \S+|\btentative\b|topology_change_detected \d|port_no \S+|port_id \S+|priority \d+|elements = \{|\}|policy (accept|drop);|conntrack`)

// skipped are lines that say nothing of the agent's: the kernel makes and removes
// them by itself.
var skipped = regexp.MustCompile(`fe80:|ff00::|multicast|anycast|^:|^\*|COMMIT|link/none`)

// snapshot is what some parts print, in an order that does not depend on when
// things were made.
func (x *site) snapshot(names ...string) (string, error) {
	var script []string
	for _, name := range names {
		script = append(script, "echo '== "+name+"'", parts[name])
	}
	out, err := x.try("set +e\n" + strings.Join(script, "\n") + "\ntrue")
	if err != nil {
		return "", err
	}
	var lines []string
	section := ""
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "== ") {
			section = strings.TrimSpace(line[3:])
			continue
		}
		fields := []string{line}
		if section == "rules" {
			fields = strings.Split(line, ",") // elements of sets come in any order
		}
		for _, f := range fields {
			f = strings.Join(strings.Fields(changing.ReplaceAllString(f, "")), " ")
			if f != "" && !skipped.MatchString(f) {
				lines = append(lines, section+": "+f)
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n"), nil
}

// difference lists the lines that only one of two snapshots has.
func difference(before, after string) string {
	a, b := strings.Split(before, "\n"), strings.Split(after, "\n")
	var out []string
	count := map[string]int{}
	for _, l := range a {
		count[l]++
	}
	for _, l := range b {
		count[l]--
	}
	for _, l := range slices.Compact(slices.Sorted(slices.Values(slices.Concat(a, b)))) {
		switch n := count[l]; {
		case n > 0:
			out = append(out, "- "+l)
		case n < 0:
			out = append(out, "+ "+l)
		}
	}
	return strings.Join(out, "\n")
}
