package iptables

import (
	"fmt"
	"slices"
	"strings"

	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/mark"
)

// script collects what iptables-restore has to do, by table.
type script map[string][]string

func (s script) add(table, format string, args ...any) {
	s[table] = append(s[table], fmt.Sprintf(format, args...))
}

// String is the input of iptables-restore; empty: nothing to do. What guards
// comes before what accepts, and what translates addresses comes last.
func (s script) String() string {
	var b strings.Builder
	for _, table := range []string{"raw", "filter", "nat"} {
		if lines := s[table]; len(lines) > 0 {
			fmt.Fprintf(&b, "*%s\n%s\nCOMMIT\n", table, strings.Join(lines, "\n"))
		}
	}
	return b.String()
}

// difference is what has to be done to have the chains of r and no other of
// ours, and how many chains that concerns.
func (f *family) difference(have tables, r firewall.Ruleset) (string, int) {
	s := script{}
	changed := 0
	wanted := map[string]bool{}
	for _, c := range r.Chains {
		wanted[c.Name] = true
		table := tableOf(c)
		rules, exists := have[table][c.Name]
		want := f.render(c, &r)
		switch {
		case c.Foreign && exists:
		case exists && slices.Equal(rules, want):
		default:
			// A new chain, or an old one without its rules: both in this one line.
			s.add(table, ":%s - [0:0]", c.Name)
		}
	}
	// Chains are there before a rule jumps to them.
	for _, c := range r.Chains {
		table := tableOf(c)
		dirty := slices.Contains(s[table], fmt.Sprintf(":%s - [0:0]", c.Name))
		if dirty && !c.Foreign {
			for _, rule := range f.render(c, &r) {
				s.add(table, "-A %s %s", c.Name, rule)
			}
		}
		if f.jump(s, have, c) || dirty {
			changed++
		}
	}
	for _, c := range ours {
		if wanted[c.name] {
			continue
		}
		changed += unhook(s, have, c.table, c.hook, c.name)
		if _, there := have[c.table][c.name]; there {
			s.add(c.table, "-F %s", c.name)
			s.add(c.table, "-X %s", c.name)
		}
	}
	return s.String(), changed
}

// jump makes sure that the hook asks the chain, exactly once and where it
// should.
func (f *family) jump(s script, have tables, c firewall.Chain) bool {
	if c.Hook == firewall.NoHook {
		return false
	}
	at := hooks[c.Hook]
	rules := have[at.table][at.hook]
	jump := "-j " + c.Name
	n := 0
	for _, r := range rules {
		if r == jump {
			n++
		}
	}
	if n == 1 && (!at.first || rules[0] == jump) {
		return false
	}
	for range n {
		s.add(at.table, "-D %s %s", at.hook, jump)
	}
	s.add(at.table, "-I %s 1 %s", at.hook, jump)
	return true
}

// unhook removes every jump from a hook to the chain. It returns 1 if there is
// anything of the chain.
func unhook(s script, have tables, table, hook, name string) int {
	there := 0
	for _, r := range have[table][hook] {
		if hook != "" && r == "-j "+name {
			s.add(table, "-D %s -j %s", hook, name)
			there = 1
		}
	}
	if _, ok := have[table][name]; ok {
		there = 1
	}
	return there
}

// removal is what has to be done to have no chain of ours. All are emptied
// before the first is removed, because they jump to each other.
func removal(have tables) (string, int) {
	s := script{}
	changed := 0
	for _, c := range ours {
		changed += unhook(s, have, c.table, c.hook, c.name)
		if _, there := have[c.table][c.name]; there {
			s.add(c.table, "-F %s", c.name)
		}
	}
	for _, c := range ours {
		if _, there := have[c.table][c.name]; there {
			s.add(c.table, "-X %s", c.name)
		}
	}
	if rules, there := have["filter"][mark.UserChain]; there && len(rules) == 0 {
		s.add("filter", "-X %s", mark.UserChain)
		changed++
	}
	return s.String(), changed
}

func tableOf(c firewall.Chain) string {
	if c.Hook == firewall.NoHook {
		return hooks[c.Table].table
	}
	return hooks[c.Hook].table
}

// render writes the rules of a chain as iptables-save prints them, so that they
// can be compared. A set of devices is several rules, one for each of its
// patterns: ipset looks a device up among all those with one address range, one
// after the other, and no more than 64 of them.
func (f *family) render(c firewall.Chain, r *firewall.Ruleset) []string {
	out := []string{}
	for _, rule := range c.Rules {
		for _, in := range patterns(rule.In, r) {
			for _, to := range patterns(rule.Out, r) {
				for _, destination := range f.destinations(rule) {
					out = append(out, f.rule(rule, in, to, destination))
				}
			}
		}
	}
	return out
}

// patterns are those of a set, or one that is empty where there is no set.
func patterns(set string, r *firewall.Ruleset) []string {
	if s, err := r.Set(set); err == nil {
		return s.Patterns
	}
	return []string{""}
}

// destinations are matches of what is not for another host, each for a rule. For IPv6
// the addresses of this host are UNICAST too, so that it takes two.
func (f *family) destinations(r firewall.Rule) []string {
	switch {
	case !r.NotOthers:
		return []string{""}
	case f.ip6:
		return []string{"! --dst-type UNICAST", "--dst-type LOCAL,ANYCAST"}
	}
	return []string{"! --dst-type UNICAST"}
}

// rule is one rule; in and out are patterns of device names, and destination is one
// of destinations.
func (f *family) rule(r firewall.Rule, in, out, destination string) string {
	var words []string
	add := func(format string, args ...any) { words = append(words, fmt.Sprintf(format, args...)) }
	if r.InDevice != "" {
		in = r.InDevice
	}
	if in != "" {
		add("-i %s", in)
	}
	if r.NotLoopback {
		add("! -i lo")
	}
	if out != "" {
		add("-o %s", out)
	}
	switch {
	case r.UDPPort != 0:
		add("-p udp -m udp --dport %d", r.UDPPort)
	case r.ICMP && f.ip6:
		add("-p ipv6-icmp")
	case r.ICMP:
		add("-p icmp")
	}
	for _, m := range []struct{ set, not, direction string }{
		{r.Src, "", "src"}, {r.Dst, "", "dst"}, {r.NotDst, "! ", "dst"},
		{r.SrcIn, "", "src,src"}, {r.NotSrcIn, "! ", "src,src"}, {r.DstIn, "", "dst,src"}, {r.SrcOut, "", "src,dst"},
	} {
		if m.set != "" {
			add("-m set %s--match-set %s %s", m.not, setName(m.set, f.ip6), m.direction)
		}
	}
	if destination != "" {
		add("-m addrtype %s", destination)
	}
	if r.Established {
		add("-m conntrack --ctstate RELATED,ESTABLISHED")
	}
	if r.Redirected {
		add("-m conntrack --ctstate DNAT")
	}
	add("%s", target(r))
	return strings.Join(words, " ")
}

func target(r firewall.Rule) string {
	switch r.Action {
	case firewall.Accept:
		return "-j ACCEPT"
	case firewall.Drop:
		return "-j DROP"
	case firewall.Jump:
		return "-j " + r.Chain
	case firewall.Goto:
		return "-g " + r.Chain
	case firewall.Masquerade:
		return "-j MASQUERADE"
	}
	return "-j RETURN"
}
