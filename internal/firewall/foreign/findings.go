package foreign

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// Host is what has to be let through.
type Host struct {
	Devices   []string       // VXLAN devices and bridges
	Subnets   []netip.Prefix // of all overlays
	Underlay4 bool           // VXLAN comes by IPv4
	Underlay6 bool           // VXLAN comes by IPv6
}

// receives reports whether VXLAN comes by IPv6 or, if not six, by IPv4.
func (h Host) receives(six bool) bool {
	if six {
		return h.Underlay6
	}
	return h.Underlay4
}

// names are what an nftables rule calls the devices, as members of a set: whatever
// bridges there will be.
func (h Host) names() string {
	var out []string
	for _, d := range h.Devices {
		for _, half := range conf.Halves {
			if prefix := half.Bridge(""); strings.HasPrefix(d, prefix) {
				d = prefix + "*"
			}
		}
		if d = strconv.Quote(d); !slices.Contains(out, d) {
			out = append(out, d)
		}
	}
	return strings.Join(out, ", ")
}

func (h Host) has6() bool {
	return slices.ContainsFunc(h.Subnets, func(p netip.Prefix) bool { return p.Addr().Is6() })
}

// Finding is one thing that stops packets.
type Finding struct {
	What     string // what comes of it
	Evidence string // what stops them, where
	Object   string // a prefix; empty: the whole host
	Show     string // the command that shows it
	Fix      string // a command, or a sentence where there is none
	Safe     bool   // Fix is a command that needs no decision
}

func (f Finding) String() string { return f.What + ": " + f.Evidence + "; see: " + f.Show }

// All is what the rules stop.
func (r Rules) All(h Host) []Finding {
	return slices.Concat(r.Forward(h), r.Input(h), r.UFW(h), r.Docker(h))
}

// Forward finds what drops forwarded packets and is not asked after us.
func (r Rules) Forward(h Host) (out []Finding) {
	const what = "the firewall drops what is forwarded: containers reach nobody beyond their bridge"
	for _, s := range r.Sets {
		if s.IPv6() && !h.has6() {
			continue
		}
		if why, undo := s.dropsAt("FORWARD"); why != "" {
			out = append(out, Finding{
				What: what, Evidence: s.Command + ": " + why + ", and no rule of the overlay stands before it",
				Show: s.Command + " --list-rules FORWARD",
				Fix:  "start the agent with --firewall iptables, of the same flavour, which is asked first; or: " + undo,
			})
		}
	}
	for _, c := range r.Chains {
		if c.Hook != "forward" || c.Family == "ip6" && !h.has6() || c.knows(h) {
			continue
		}
		out = append(out, Finding{
			What: what, Evidence: fmt.Sprintf("chain %s of nftables' table %s %s drops what it does not accept, and accepts nothing of the overlay", c.Name, c.Family, c.Table),
			Show: fmt.Sprintf("nft list table %s %s", c.Family, c.Table),
			Fix: fmt.Sprintf(`nft insert rule %[1]s %[2]s %[3]s iifname '{ %[4]s }' accept && nft insert rule %[1]s %[2]s %[3]s oifname '{ %[4]s }' accept, and the same in /etc/nftables.conf`,
				c.Family, c.Table, c.Name, h.names()),
		})
	}
	return out
}

const inputDropped = "the firewall drops what other hosts send: their containers are not reached"

// Input finds what drops VXLAN.
func (r Rules) Input(h Host) (out []Finding) {
	port := fmt.Sprint(conf.VXLANPort)
	for _, s := range r.Sets {
		if !h.receives(s.IPv6()) || s.has(s.ufwChain()) || s.acceptsVXLAN() {
			continue
		}
		why, _ := s.dropsAt("INPUT")
		if s.policy["filter/INPUT"] == "DROP" && why == "" {
			why = "the policy of INPUT is DROP"
		}
		if why == "" {
			continue
		}
		out = append(out, Finding{
			What: inputDropped, Evidence: s.Command + ": " + why + ", and no rule accepts UDP port " + port,
			Show: s.Command + " --list-rules INPUT",
			Fix:  s.Command + " --wait --insert INPUT --protocol udp --dport " + port + " --jump ACCEPT", Safe: true,
		})
	}
	for _, c := range r.Chains {
		if c.Hook != "input" || c.Family != "inet" && !h.receives(c.Family == "ip6") || c.knows(h) {
			continue
		}
		out = append(out, Finding{
			What: inputDropped, Evidence: fmt.Sprintf("chain %s of nftables' table %s %s drops what it does not accept, and has no rule for UDP port %s", c.Name, c.Family, c.Table, port),
			Show: fmt.Sprintf("nft list table %s %s", c.Family, c.Table),
			Fix:  fmt.Sprintf("nft insert rule %s %s %s udp dport %s accept, and the same in /etc/nftables.conf", c.Family, c.Table, c.Name, port),
		})
	}
	return out
}

// acceptsVXLAN reports whether a rule accepts the VXLAN port. Ours does where it
// is asked first; it knows the peers.
func (r Ruleset) acceptsVXLAN() bool {
	accepts := func(chain string) bool {
		return slices.ContainsFunc(r.rules[chain], func(rule string) bool {
			return strings.Contains(rule, "dport "+fmt.Sprint(conf.VXLANPort)) && strings.HasSuffix(rule, "-j ACCEPT")
		})
	}
	if input := r.rules["filter/INPUT"]; len(input) > 0 && input[0] == "-j "+mark.InputChain && accepts("filter/"+mark.InputChain) {
		return true
	}
	for chain := range r.rules {
		if strings.HasPrefix(chain, "filter/") && !strings.HasPrefix(chain, "filter/OVERLAY-") && accepts(chain) {
			return true
		}
	}
	return false
}

// ufwChain is where ufw has the rules of its user.
func (r Ruleset) ufwChain() string {
	if r.IPv6() {
		return "filter/ufw6-user-input"
	}
	return "filter/ufw-user-input"
}

// UFW finds an active ufw that keeps VXLAN out.
func (r Rules) UFW(h Host) (out []Finding) {
	port := fmt.Sprint(conf.VXLANPort)
	for _, s := range r.Sets {
		if !h.receives(s.IPv6()) || s.acceptsVXLAN() {
			continue
		}
		if s.has(s.ufwChain()) {
			out = append(out, Finding{
				What:     "ufw drops what other hosts send: their containers are not reached",
				Evidence: s.Command + ": ufw is active and has no rule for UDP port " + port,
				Show:     "ufw status verbose", Fix: "ufw allow " + port + "/udp",
			})
		}
	}
	return out
}

// Docker finds the rules by which Docker 28 and later keep all but its own bridge
// from containers.
func (r Rules) Docker(h Host) (out []Finding) {
	for _, s := range r.Sets {
		for _, rule := range s.rules["raw/PREROUTING"] {
			f := strings.Fields(rule)
			at := slices.Index(f, "-d")
			if at < 0 || at+1 >= len(f) || !strings.HasSuffix(rule, "-j DROP") {
				continue
			}
			dst, err := netip.ParsePrefix(f[at+1])
			if err != nil || !slices.ContainsFunc(h.Subnets, dst.Overlaps) {
				continue
			}
			out = append(out, Finding{
				What: "Docker drops what other hosts and bridges send to " + dst.String(), Object: dst.String(),
				Evidence: s.Command + ": raw PREROUTING " + rule, Show: s.Command + " --table raw --list-rules PREROUTING",
				Fix: `set "allow-direct-routing": true in /etc/docker/daemon.json and restart dockerd; until then: ` + s.Command + " --table raw --delete PREROUTING " + rule,
			})
		}
	}
	return out
}

// Flavours reports whether rules of both flavours of iptables are in use: both are
// asked, each knows nothing of the other.
func (r Rules) Flavours() (nft, legacy *Ruleset) {
	for i := range r.Sets {
		s := &r.Sets[i]
		switch {
		case s.Lines == 0 || s.IPv6():
		case strings.HasSuffix(s.Command, "legacy"):
			legacy = s
		default:
			nft = s
		}
	}
	return nft, legacy
}
