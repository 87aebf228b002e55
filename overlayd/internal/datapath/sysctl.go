package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// rpFilterLoose accepts a packet whose source is reachable at all, through
// whichever device.
const rpFilterLoose = 2

const procSys = "/proc/sys/"

const (
	forward4 = "net/ipv4/ip_forward"
	forward6 = "net/ipv6/conf/all/forwarding"
)

// setting is one wanted sysctl. It is named by its path below /proc/sys, since
// a device name may contain dots.
type setting struct{ key, value, dev, overlay string }

// settings lists the sysctls we want, those of the host first.
func settings(c Config, ipv6 bool) []setting {
	s := []setting{{key: forward4, value: "1"}}
	if ipv6 && wants6(c) {
		s = append(s, setting{key: forward6, value: "1"})
	}
	for _, d := range devices(c) {
		on := func(family, key, value string) {
			s = append(s, setting{fmt.Sprintf("net/%s/conf/%s/%s", family, d.name, key), value, d.name, d.overlay})
		}
		on("ipv4", "forwarding", "1")
		// Loose: what a peer's host sends has its VTEP address and what its
		// containers send has theirs, and the way back may be another one.
		on("ipv4", "rp_filter", strconv.Itoa(rpFilterLoose))
		// Otherwise removing a stale address takes its successor along.
		on("ipv4", "promote_secondaries", "1")
		if !ipv6 {
			continue
		}
		// No container and no peer configures this host.
		on("ipv6", "accept_ra", "0")
		on("ipv6", "autoconf", "0")
		on("ipv6", "accept_redirects", "0")
		if d.overlay == "" {
			// Nobody on the other side of the VTEP answers multicast, so a
			// link-local address there is good for nothing. Bridges keep
			// theirs: neighbour discovery wants one.
			on("ipv6", "addr_gen_mode", "1")
		}
		if d.has6() {
			on("ipv6", "disable_ipv6", "0")
			on("ipv6", "forwarding", "1")
			// The addresses are unique already, and waiting a second for
			// nobody's objection delays the first packet.
			on("ipv6", "accept_dad", "0")
		}
	}
	return s
}

// wants6 says whether any overlay has an IPv6 subnet.
func wants6(c Config) bool {
	for _, o := range c.Overlays {
		if slices.ContainsFunc(o.Subnets, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
			return true
		}
	}
	return false
}

// planSysctls sets what differs. A device that is about to be made starts with
// the defaults, whatever a device of that name had.
func (p *planned) planSysctls(have *state, fresh map[string]bool) {
	usable := map[string]bool{"": true}
	for _, d := range p.devices {
		usable[d.name] = true
	}
	for _, s := range settings(p.cfg, have.ipv6 && p.mtu >= minMTU6) {
		if !usable[s.dev] || have.sysctls[s.key] == s.value && !fresh[s.dev] {
			continue
		}
		if s.key == forward6 {
			// A host that forwards ignores router advertisements unless
			// accept_ra is 2. Without this a host that got its default route
			// that way would lose it when the lifetime ends.
			for _, name := range have.acceptRA {
				if !usable[name] {
					p.add(op{act: set, obj: sysctl, key: "net/ipv6/conf/" + name + "/accept_ra", value: "2"})
				}
			}
		}
		p.add(op{act: set, obj: sysctl, dev: s.dev, overlay: s.overlay, key: s.key, value: s.value})
	}
}

// readSysctls reads the present values of what we want to set; what is not
// there is left out.
func (s *state) readSysctls(c Config) {
	s.sysctls = map[string]string{}
	for _, w := range settings(c, s.ipv6) {
		if v, ok := readSysctl(w.key); ok {
			s.sysctls[w.key] = v
		}
	}
	if !s.ipv6 || !wants6(c) || s.sysctls[forward6] == "1" {
		return
	}
	for name := range s.links {
		if v, ok := readSysctl("net/ipv6/conf/" + name + "/accept_ra"); ok && v == "1" {
			s.acceptRA = append(s.acceptRA, name)
		}
	}
	slices.Sort(s.acceptRA)
}

func hasIPv6() bool {
	_, err := os.Stat(procSys + "net/ipv6/conf/all")
	return err == nil
}

func readSysctl(key string) (string, bool) {
	b, err := os.ReadFile(filepath.Join(procSys, key))
	return strings.TrimSpace(string(b)), err == nil
}

func writeSysctl(key, value string) error {
	f, err := os.OpenFile(filepath.Join(procSys, key), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
