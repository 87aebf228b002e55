package plan

import (
	"fmt"
	"strconv"

	"overlayd.internal/overlay/internal/mark"
)

// RPFilterLoose accepts a packet whose source is reachable at all, through
// whichever device.
const RPFilterLoose = 2

const (
	forward4 = "net/ipv4/ip_forward"
	forward6 = "net/ipv6/conf/all/forwarding"
)

// Setting is one wanted sysctl. It is named by its path below /proc/sys, since
// a device name may contain dots.
type Setting struct{ Key, Value, Dev, Overlay string }

// ForwardingKey is the sysctl that lets packets which come in on a link pass.
func ForwardingKey(link string) string { return "net/ipv4/conf/" + link + "/forwarding" }

// ListensToRouters reports whether the links' accept_ra matters, because IPv6
// forwarding is about to be turned on.
func (w Wanted) ListensToRouters(sysctls map[string]string) bool {
	return w.has6() && sysctls[forward6] != "1"
}

// Settings lists the sysctls we want, those of the host first.
func (w Wanted) Settings(ipv6 bool) []Setting {
	s := []Setting{{Key: forward4, Value: "1"}}
	if ipv6 && w.has6() {
		s = append(s, Setting{Key: forward6, Value: "1"})
	}
	for _, d := range w.Devices() {
		on := func(family, key, value string) {
			s = append(s, Setting{fmt.Sprintf("net/%s/conf/%s/%s", family, d.Name, key), value, d.Name, d.Overlay})
		}
		on("ipv4", "forwarding", "1")
		// Loose: what a peer's host sends has its VTEP address and what its
		// containers send has theirs, and the way back may be another one.
		on("ipv4", "rp_filter", strconv.Itoa(RPFilterLoose))
		// Otherwise removing a stale address takes its successor along.
		on("ipv4", "promote_secondaries", "1")
		if d.blocks4() > 1 {
			// Docker gives all containers of a network one gateway. Those with an
			// address of a further block have all between the two on their link,
			// and the bridge answers for what is elsewhere, at once.
			on("ipv4", "proxy_arp", "1")
			s = append(s, Setting{fmt.Sprintf("net/ipv4/neigh/%s/proxy_delay", d.Name), "0", d.Name, d.Overlay})
		}
		if !ipv6 {
			continue
		}
		// No container and no peer configures this host.
		on("ipv6", "accept_ra", "0")
		on("ipv6", "autoconf", "0")
		on("ipv6", "accept_redirects", "0")
		if d.Overlay == "" {
			// Nobody on the other side of the VTEP answers multicast, so a
			// link-local address there is good for nothing. Bridges keep
			// theirs: neighbour discovery wants one.
			on("ipv6", "addr_gen_mode", "1")
		}
		if d.has6() || d.Name == mark.SecondVTEP && w.VTEP.IP6.IsValid() {
			on("ipv6", "disable_ipv6", "0")
			on("ipv6", "forwarding", "1")
			// The addresses are unique already, and waiting a second for
			// nobody's objection delays the first packet.
			on("ipv6", "accept_dad", "0")
		}
	}
	return s
}

// planSysctls sets what differs. A device that is about to be made starts with
// the defaults, whatever a device of that name had.
func (p *Plan) planSysctls(have *State) {
	usable := map[string]bool{"": true}
	for _, d := range p.Devices {
		usable[d.Name] = true
	}
	for _, s := range p.Settings(have.IPv6) {
		if !usable[s.Dev] || have.Sysctls[s.Key] == s.Value && !p.Fresh[s.Dev] {
			continue
		}
		if s.Key == forward6 {
			// A host that forwards ignores router advertisements unless
			// accept_ra is 2. Without this a host that got its default route
			// that way would lose it when the lifetime ends.
			for _, name := range have.AcceptRA {
				if !usable[name] {
					p.add(Op{Act: Set, Obj: Sysctl, Key: "net/ipv6/conf/" + name + "/accept_ra", Value: "2"})
				}
			}
		}
		p.add(Op{Act: Set, Obj: Sysctl, Dev: s.Dev, Overlay: s.Overlay, Key: s.Key, Value: s.Value})
	}
}

// Settings lists the sysctls of what this host can have.
func (p *Plan) Settings(ipv6 bool) []Setting { return p.Wanted.Settings(ipv6 && p.MTU >= minMTU6) }

// HostWide reports whether the sysctl is one of the two that let the host
// forward at all.
func HostWide(key string) bool { return key == forward4 || key == forward6 }
