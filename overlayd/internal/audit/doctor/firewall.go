package doctor

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
)

// ruleset is what one iptables-save prints: a flavour and a family.
type ruleset struct {
	program string // iptables-nft-save and the like
	command string // to change it
	policy  map[string]string
	rules   map[string][]string // by table/chain, each as it was printed
	lines   int
}

// readRules reads both flavours and families; what is not installed or has no
// rules is left out.
func readRules(ctx context.Context) (out []ruleset) {
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, flavour := range []string{"nft", "legacy"} {
			r := ruleset{program: family + "-" + flavour + "-save", command: family + "-" + flavour}
			if flavour == "legacy" && !loaded(family) {
				continue // asking would load it
			}
			if text, ok := output(ctx, r.program); ok {
				r.parse(text)
				out = append(out, r)
			}
		}
	}
	return out
}

func (r *ruleset) parse(text string) {
	r.policy, r.rules = map[string]string{}, map[string][]string{}
	table := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
		case strings.HasPrefix(line, ":"):
			if f := strings.Fields(line[1:]); len(f) > 1 {
				r.policy[table+"/"+f[0]] = f[1]
			}
		case strings.HasPrefix(line, "-A "):
			chain, rule, _ := strings.Cut(line[3:], " ")
			r.rules[table+"/"+chain] = append(r.rules[table+"/"+chain], rule)
			r.lines++
		}
	}
}

// has reports whether a chain exists.
func (r ruleset) has(chain string) bool {
	_, ok := r.policy[chain]
	return ok
}

// ours reports whether a rule jumps to a chain of ours.
func ours(rule string) bool { return strings.Contains(rule, "-j OVERLAY-") }

// drops reports whether a rule drops without asking for more than a device or a
// protocol.
func drops(rule string) bool {
	return strings.HasPrefix(rule, "-j DROP") || strings.HasPrefix(rule, "-j REJECT")
}

// checkForwardPolicy looks for a FORWARD chain that drops and that we are not
// asked before.
func checkForwardPolicy(h *host) (out []Finding) {
	for _, r := range h.rules {
		if strings.HasPrefix(r.command, "ip6") && !h.has6() {
			continue
		}
		rules := r.rules["filter/FORWARD"]
		first := slices.IndexFunc(rules, ours)
		drop := slices.IndexFunc(rules, drops)
		evidence := ""
		switch {
		case drop >= 0 && (first < 0 || drop < first):
			evidence = fmt.Sprintf("%s: FORWARD %s stands before the rule of the overlay", r.command, rules[drop])
		case r.policy["filter/FORWARD"] == "DROP" && first < 0:
			evidence = r.command + ": the policy of FORWARD is DROP, and no rule of the overlay stands there"
		default:
			continue
		}
		out = append(out, Finding{
			Severity: Error, What: "the firewall drops what is forwarded: containers reach nobody beyond their bridge",
			Evidence: evidence, Fix: restart + " puts the overlay's rules first; or: " + r.command + " --policy FORWARD ACCEPT",
		})
	}
	return out
}

// checkInput looks for an INPUT chain that drops VXLAN.
func checkInput(h *host) (out []Finding) {
	port := fmt.Sprint(conf.VXLANPort)
	for _, r := range h.rules {
		if strings.HasPrefix(r.command, "ip6") != h.state.IP.Is6() {
			continue
		}
		accepted := false
		for chain, rules := range r.rules {
			if strings.HasPrefix(chain, "filter/") && !strings.HasPrefix(chain, "filter/OVERLAY-") { // ours drop only
				accepted = accepted || slices.ContainsFunc(rules, func(rule string) bool {
					return strings.Contains(rule, "dport "+port) && strings.Contains(rule, "-j ACCEPT")
				})
			}
		}
		dropped := r.policy["filter/INPUT"] == "DROP" || slices.ContainsFunc(r.rules["filter/INPUT"], drops)
		if !dropped || accepted || r.has("filter/ufw-user-input") {
			continue
		}
		out = append(out, Finding{
			Severity: Error, What: "the firewall drops what other hosts send: their containers are not reached",
			Evidence: r.command + ": INPUT drops, and no rule accepts UDP port " + port,
			Fix:      r.command + " --wait --insert INPUT --protocol udp --dport " + port + " --jump ACCEPT", safe: true,
		})
	}
	return out
}

func checkUFW(h *host) (out []Finding) {
	port := fmt.Sprint(conf.VXLANPort)
	for _, r := range h.rules {
		if strings.HasPrefix(r.command, "ip6") || !r.has("filter/ufw-user-input") {
			continue
		}
		if !slices.ContainsFunc(r.rules["filter/ufw-user-input"], func(rule string) bool { return strings.Contains(rule, "dport "+port) }) {
			out = append(out, Finding{
				Severity: Error, What: "ufw drops what other hosts send: their containers are not reached",
				Evidence: "ufw is active and has no rule for UDP port " + port, Fix: "ufw allow " + port + "/udp",
			})
		}
	}
	return out
}

// checkDocker looks for the rules by which Docker 28 and later keep all but its
// own bridge from containers.
func checkDocker(h *host) (out []Finding) {
	for _, r := range h.rules {
		for _, rule := range r.rules["raw/PREROUTING"] {
			f := strings.Fields(rule)
			at := slices.Index(f, "-d")
			if at < 0 || at+1 >= len(f) || !strings.HasSuffix(rule, "-j DROP") {
				continue
			}
			dst, err := netip.ParsePrefix(f[at+1])
			if err != nil || !overlaps(h.state.Overlays, dst) {
				continue
			}
			out = append(out, Finding{
				Severity: Error, What: "Docker drops what other hosts and bridges send to " + dst.String(),
				Evidence: r.command + ": raw PREROUTING " + rule, Object: dst.String(),
				Fix: `set "allow-direct-routing": true in /etc/docker/daemon.json and restart dockerd; until then: ` + r.command + " --table raw --delete PREROUTING " + rule,
			})
		}
	}
	return out
}

func checkFirewalld(h *host) []Finding {
	text, ok := output(h.ctx, "nft", "list", "table", "inet", "firewalld")
	if !ok || len(h.healthy()) == 0 {
		return nil
	}
	var outside []string
	for _, dev := range h.devices() {
		if !strings.Contains(text, `"`+dev+`"`) {
			outside = append(outside, dev)
		}
	}
	if len(outside) == 0 {
		return nil
	}
	return []Finding{{
		Severity: Error, What: "firewalld drops what is forwarded from and to devices that it does not trust",
		Evidence: "table inet firewalld names no zone for " + strings.Join(outside, ", "),
		// The agent does so by itself where it may; a zone of its own comes first.
		Fix: "firewall-cmd --permanent --zone=trusted --add-interface=" + strings.Join(outside, " --add-interface=") + " && firewall-cmd --reload",
	}}
}

// checkFlavours: rules of both flavours are asked, each knows nothing of the
// other, and what accepts in one is dropped in the other.
func checkFlavours(h *host) (out []Finding) {
	var nft, legacy *ruleset
	for i := range h.rules {
		r := &h.rules[i]
		switch {
		case r.lines == 0 || strings.HasPrefix(r.command, "ip6"):
		case strings.HasSuffix(r.command, "legacy"):
			legacy = r
		default:
			nft = r
		}
	}
	if nft == nil || legacy == nil {
		return nil
	}
	return []Finding{{
		Severity: Warning, What: "rules of both flavours of iptables are in use: a packet has to pass both, and each shows only its own",
		Evidence: fmt.Sprintf("%d rules of %s, %d of %s", nft.lines, nft.command, legacy.lines, legacy.command),
		Fix:      "move the rules of one to the other: iptables-legacy-save | iptables-nft-restore --noflush && iptables-legacy --flush",
	}}
}
