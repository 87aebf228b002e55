package fastpath

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"overlayd.internal/overlay/internal/mark"
)

// ownChains starts the names of the chains of our firewall.
const ownChains = "OVERLAY-"

// xtables looks for a rule that concerns us in what iptables-save prints.
func (s scope) xtables(saved []byte) (found string) {
	var table string
	policies := map[string]string{}
	chains := map[string][][]string{}
	look := func() string {
		for _, hook := range []string{"PREROUTING", "FORWARD", "POSTROUTING", mark.UserChain} {
			if rule := s.xtChain(table, hook, policies[hook], chains, nil); rule != "" {
				return "-t " + table + " " + rule
			}
		}
		return ""
	}
	for line := range strings.Lines(string(saved)) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
			clear(policies)
			clear(chains)
		case strings.HasPrefix(line, ":"):
			f := strings.Fields(line[1:])
			if len(f) > 1 {
				policies[f[0]] = f[1]
			}
		case strings.HasPrefix(line, "-A "):
			words := xtWords(line)
			chains[words[1]] = append(chains[words[1]], words)
		case line == "COMMIT":
			if found = look(); found != "" {
				return found
			}
		}
	}
	return ""
}

// xtWords splits a line of iptables-save, which quotes words with blanks.
func xtWords(line string) (words []string) {
	for line = strings.TrimSpace(line); line != ""; line = strings.TrimSpace(line) {
		if word, err := strconv.QuotedPrefix(line); err == nil {
			text, _ := strconv.Unquote(word)
			words, line = append(words, text), line[len(word):]
			continue
		}
		end := strings.IndexByte(line, ' ')
		if end < 0 {
			end = len(line)
		}
		words, line = append(words, line[:end]), line[end:]
	}
	return words
}

// xtHarmless are targets that let packets be, or see to what the fast path does
// in its own way.
var xtHarmless = []string{"", "ACCEPT", "RETURN", "CT", "NOTRACK"}

// xtChain looks at the rules of a chain in order, and at those of the chains it
// leads to.
func (s scope) xtChain(table, chain, policy string, chains map[string][][]string, above []string) string {
	if slices.Contains(above, chain) {
		return ""
	}
	for _, words := range chains[chain] {
		target, matches := s.xtRule(words)
		switch {
		case strings.HasPrefix(target, ownChains):
			if table == "filter" && chain == "FORWARD" {
				return "" // what is ours ends there
			}
		case !matches, slices.Contains(xtHarmless, target):
		case target == "TCPMSS" && slices.Contains(words, "--clamp-mss-to-pmtu"):
		case chains[target] != nil:
			if rule := s.xtChain(table, target, "-", chains, append(above, chain)); rule != "" {
				return rule
			}
		default:
			if _, user := chains[target]; !user {
				return strings.Join(words, " ")
			}
		}
	}
	if policy == "DROP" {
		return "-P " + chain + " DROP"
	}
	return ""
}

// xtRule is where a rule leads and whether it may match packets of ours. What it
// does not know may match.
func (s scope) xtRule(words []string) (target string, matches bool) {
	matches = true
	not := false
	var from, to netip.Prefix
	for i := 2; i < len(words); i++ {
		value := ""
		if i+1 < len(words) {
			value = words[i+1]
		}
		switch words[i] {
		case "!":
			not = true
			continue
		case "-j", "-g":
			target = value
		case "-s", "-d":
			p, err := netip.ParsePrefix(value)
			if a, e := netip.ParseAddr(value); e == nil {
				p, err = netip.PrefixFrom(a, a.BitLen()), nil
			}
			if err != nil {
				break
			}
			matches = matches && s.inPrefix(p, not)
			switch {
			case not:
			case words[i] == "-s":
				from = p
			default:
				to = p
			}
		case "-i", "-o":
			if name, wild := strings.CutSuffix(value, "+"); wild {
				value = name + "*"
			}
			matches = matches && (not || s.device(value))
		case "--dst-type":
			// To peers is not to this host.
			matches = matches && (value != "LOCAL" || not)
		case "--mark":
			// Nothing marks what comes from containers but rules that are found
			// themselves.
			number, _, _ := strings.Cut(value, "/")
			n, err := strconv.ParseUint(number, 0, 32)
			matches = matches && (err != nil || n == 0 || not)
		}
		not = false
	}
	return target, matches && !toItself(from, to)
}

// toItself says that a rule is about what an address sends to itself, as Docker
// makes for every published port. That never leaves the host.
func toItself(from, to netip.Prefix) bool { return from == to && from.IsSingleIP() }

func (s scope) inPrefix(p netip.Prefix, not bool) bool {
	if not {
		return !s.covered(p)
	}
	return s.overlaps(p)
}
