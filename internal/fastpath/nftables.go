package fastpath

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"overlayd.internal/overlay/internal/mark"
)

// nftObject is one object of nft -j list ruleset.
type nftObject struct {
	Chain *struct {
		Family, Table, Name, Type, Hook, Policy string
	}
	Rule *struct {
		Family, Table, Chain string
		Expr                 []map[string]json.RawMessage
	}
}

// nftRule is the expressions of a rule.
type nftRule = []map[string]json.RawMessage

// nftHooks are where packets between two containers come by; those of a bridge are
// for the host, and from it, as frames to and from the gateway.
func nftHooks(family string) []string {
	hooks := []string{"prerouting", "forward", "postrouting"}
	if family == "bridge" {
		hooks = append(hooks, "input", "output")
	}
	return hooks
}

// nftables looks for a rule that concerns us in what nft prints. skip says which
// tables are ours or were looked at otherwise.
func (s scope) nftables(printed []byte, skip func(family, table string) bool) (string, error) {
	var all struct{ Nftables []nftObject }
	if err := json.Unmarshal(printed, &all); err != nil {
		return "", err
	}
	rules := map[string][]nftRule{}
	for _, o := range all.Nftables {
		if r := o.Rule; r != nil {
			key := r.Family + " " + r.Table + " " + r.Chain
			rules[key] = append(rules[key], r.Expr)
		}
	}
	if own := "inet " + mark.NFTable; s.nftChain(own, mark.UserChain, rules, nil) {
		return fmt.Sprintf("a rule in chain %s of table %s", mark.UserChain, own), nil
	}
	for _, o := range all.Nftables {
		c := o.Chain
		if c == nil || !slices.Contains(nftHooks(c.Family), c.Hook) || c.Family == "arp" || c.Family == "netdev" || skip(c.Family, c.Table) {
			continue
		}
		table := c.Family + " " + c.Table
		if s.nftChain(table, c.Name, rules, nil) || c.Policy == "drop" {
			return fmt.Sprintf("chain %s of table %s at the hook %s", c.Name, table, c.Hook), nil
		}
	}
	return "", nil
}

// nftChain reports whether a rule of the chain, or of one it leads to, concerns
// us.
func (s scope) nftChain(table, chain string, rules map[string][]nftRule, above []string) bool {
	if slices.Contains(above, chain) {
		return false
	}
	above = append(slices.Clone(above), chain)
	return slices.ContainsFunc(rules[table+" "+chain], func(r nftRule) bool { return s.nftConcerns(table, r, rules, above) })
}

// nftConcerns looks at the expressions in order: at one that cannot match, the
// rule ends.
func (s scope) nftConcerns(table string, r nftRule, rules map[string][]nftRule, above []string) bool {
	var ends [2]netip.Prefix // source and destination, where the rule has one of each
	for _, expr := range r {
		for kind, value := range expr {
			switch kind {
			case "match":
				nftEnd(value, &ends)
				if !s.nftMatches(value) || toItself(ends[0], ends[1]) {
					return false
				}
			case "accept", "return", "continue", "counter", "comment", "notrack":
			case "jump", "goto":
				var to struct{ Target string }
				if json.Unmarshal(value, &to) != nil || s.nftChain(table, to.Target, rules, above) {
					return true
				}
			default:
				return true
			}
		}
	}
	return false
}

// nftMatches reports whether a match may be one of a packet of ours. What it does
// not know may be.
func (s scope) nftMatches(value json.RawMessage) bool {
	var m struct {
		Op   string
		Left struct {
			Meta    struct{ Key string }
			Payload struct{ Field string }
			Fib     struct {
				Result string
				Flags  json.RawMessage
			}
		}
		Right json.RawMessage
	}
	if json.Unmarshal(value, &m) != nil || m.Op != "==" && m.Op != "!=" && m.Op != "in" {
		return true
	}
	not := m.Op == "!="
	switch {
	case m.Left.Meta.Key == "iifname", m.Left.Meta.Key == "oifname", m.Left.Meta.Key == "ibrname", m.Left.Meta.Key == "obrname":
		names, ok := nftStrings(m.Right)
		return !ok || not || slices.ContainsFunc(names, s.device)
	case m.Left.Meta.Key == "mark":
		var n uint64
		return json.Unmarshal(m.Right, &n) != nil || n == 0 || not
	case m.Left.Payload.Field == "saddr", m.Left.Payload.Field == "daddr":
		prefixes, ok := nftPrefixes(m.Right)
		return !ok || slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return s.inPrefix(p, not) })
	case m.Left.Fib.Result == "type" && strings.Contains(string(m.Left.Fib.Flags), "daddr"):
		names, ok := nftStrings(m.Right)
		return !ok || not || !slices.Equal(names, []string{"local"})
	}
	return true
}

// nftEnd notes the one source or destination that a match names.
func nftEnd(value json.RawMessage, ends *[2]netip.Prefix) {
	var m struct {
		Op    string
		Left  struct{ Payload struct{ Field string } }
		Right json.RawMessage
	}
	if json.Unmarshal(value, &m) != nil || m.Op != "==" {
		return
	}
	i := slices.Index([]string{"saddr", "daddr"}, m.Left.Payload.Field)
	if i < 0 {
		return
	}
	if p, ok := nftPrefixes(m.Right); ok && len(p) == 1 {
		ends[i] = p[0]
	}
}

// nftElements are the elements of a set written in the rule, or the one value.
func nftElements(right json.RawMessage) []json.RawMessage {
	var set struct{ Set []json.RawMessage }
	if json.Unmarshal(right, &set) == nil && set.Set != nil {
		return set.Set
	}
	return []json.RawMessage{right}
}

// nftStrings are names; ok is false where they are not written in the rule.
func nftStrings(right json.RawMessage) (names []string, ok bool) {
	for _, e := range nftElements(right) {
		var name string
		if json.Unmarshal(e, &name) != nil || strings.HasPrefix(name, "@") {
			return nil, false
		}
		names = append(names, name)
	}
	return names, true
}

func nftPrefixes(right json.RawMessage) (prefixes []netip.Prefix, ok bool) {
	for _, e := range nftElements(right) {
		var text string
		var object struct {
			Prefix *struct {
				Addr string
				Len  int
			}
		}
		switch {
		case json.Unmarshal(e, &text) == nil:
			a, err := netip.ParseAddr(text)
			if err != nil {
				return nil, false
			}
			prefixes = append(prefixes, netip.PrefixFrom(a, a.BitLen()))
		case json.Unmarshal(e, &object) == nil && object.Prefix != nil:
			a, err := netip.ParseAddr(object.Prefix.Addr)
			if err != nil {
				return nil, false
			}
			prefixes = append(prefixes, netip.PrefixFrom(a, object.Prefix.Len))
		default:
			return nil, false
		}
	}
	return prefixes, true
}
