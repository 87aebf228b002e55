package conf

import (
	"fmt"
	"net/netip"
	"strings"
)

// The limits of the cluster configuration.
const (
	MinVTEPBits  = 8   // a VTEP's MAC has room for the low 24 bits of its IPv4 address
	MaxVTEPBits  = 30  // the longest vtep_subnet that holds an address
	MaxVTEPBits6 = 126 // the same for vtep_subnet6
	MaxPrefix    = 29  // an agent subnet of /29 has one container in each half
	MaxPrefix6   = 125 // one of /125 has two
	MinMTU       = 552
	MinMTU6      = 1280 // what IPv6 demands of every link
	MaxMTU       = 65535
	MaxAllow     = 30 // ipset has room for 64 devices with one address range, two of each overlay
)

// unusable are the address ranges no overlay and no VTEP can be in. A function,
// so that the programs that never validate do not build it at their start.
func unusable() []unusableRange {
	return []unusableRange{
		{netip.MustParsePrefix("0.0.0.0/8"), "unspecified"},
		{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
		{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
		{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
		{netip.MustParsePrefix("255.255.255.255/32"), "broadcast"},
		{netip.MustParsePrefix("::/128"), "unspecified"},
		{netip.MustParsePrefix("::1/128"), "loopback"},
		{netip.MustParsePrefix("::ffff:0.0.0.0/96"), "IPv4-mapped"},
		{netip.MustParsePrefix("fe80::/10"), "link-local"},
		{netip.MustParsePrefix("ff00::/8"), "multicast"},
	}
}

type unusableRange struct {
	prefix netip.Prefix
	what   string
}

// Validate returns everything that is wrong with the configuration, in the
// order of the fields, and nil if nothing is.
func (n Network) Validate() []Problem {
	var c checker
	c.vtep(n)
	if len(n.Overlays) == 0 {
		c.add("overlays", "missing or empty; configure at least one overlay")
	}
	if n.Reclaim != "" && n.Reclaim != ReclaimExpired && n.Reclaim != ReclaimNever {
		c.add("reclaim", "%.80q: want %s or %s", n.Reclaim, ReclaimExpired, ReclaimNever)
	}
	names := map[string]int{}
	for i, o := range n.Overlays {
		path := fmt.Sprintf("overlays[%d]", i)
		c.name(path+".name", o.Name, i, names)
		c.overlay(path, o)
	}
	for i, o := range n.Overlays {
		c.allow(fmt.Sprintf("overlays[%d].allow", i), o, names)
	}
	return c.problems
}

// checker collects problems and the ranges seen so far.
type checker struct {
	problems []Problem
	ranges   []pathPrefix
}

// pathPrefix is a range and the field it stands in.
type pathPrefix struct {
	path   string
	prefix netip.Prefix
}

func (c *checker) add(path, format string, args ...any) {
	c.problems = append(c.problems, Problem{Path: path, Text: fmt.Sprintf(format, args...)})
}

// vtep checks the fields that concern the VTEPs.
func (c *checker) vtep(n Network) {
	if !n.VTEPSubnet.IsValid() {
		switch {
		case n.HasIPv4():
			c.add("vtep_subnet", "missing, but an overlay has subnet; give the IPv4 range the VTEP addresses come from, as in 44.128.0.0/20")
		case !n.VTEPSubnet6.IsValid() && !n.HasIPv6():
			c.add("vtep_subnet", "missing; give the IPv4 range the VTEP addresses come from, as in 44.128.0.0/20, or vtep_subnet6 where all overlays have IPv6 alone")
		}
	} else if c.subnet("vtep_subnet", n.VTEPSubnet, true) {
		switch bits := n.VTEPSubnet.Bits(); {
		case bits < MinVTEPBits:
			c.add("vtep_subnet", "%s is too large: VTEP MACs are made from the last 24 bits of the address, so use a /%d or longer", n.VTEPSubnet, MinVTEPBits)
		case bits > MaxVTEPBits:
			c.add("vtep_subnet", "%s is too small to hold a VTEP; use a /%d or shorter", n.VTEPSubnet, MaxVTEPBits)
		}
	}
	if !n.VTEPSubnet6.IsValid() {
		if n.HasIPv6() {
			c.add("vtep_subnet6", "missing, but an overlay has subnet6; give the IPv6 range the VTEP addresses come from, as in fd01:a::/64")
		}
	} else if c.subnet("vtep_subnet6", n.VTEPSubnet6, false) && n.VTEPSubnet6.Bits() > MaxVTEPBits6 {
		c.add("vtep_subnet6", "%s is too small to hold a VTEP; use a /%d or shorter", n.VTEPSubnet6, MaxVTEPBits6)
	}
	c.oui("vtep_mac_oui", n.VTEPMACOUI)

	min, why := MinMTU, ""
	if n.HasIPv6() {
		min, why = MinMTU6, " because an overlay has subnet6"
	}
	if n.VTEPMTU != 0 && (n.VTEPMTU < min || n.VTEPMTU > MaxMTU) {
		c.add("vtep_mtu", "%d: must be between %d and %d%s, or left out to follow the host's network", n.VTEPMTU, min, MaxMTU, why)
	}
}

func (c *checker) oui(path, s string) {
	if s == "" {
		c.add(path, "missing; give the first three bytes of the VTEP MACs, as in 70:B3:D5:00:00:00")
		return
	}
	m, err := ParseMAC(s)
	if err != nil {
		c.add(path, "%v; want the form 70:B3:D5:00:00:00", err)
		return
	}
	if m[3] != 0 || m[4] != 0 || m[5] != 0 {
		c.add(path, "%q: the last three bytes come from the VTEP's address and must be 0; write %s", s, MAC{m[0], m[1], m[2]})
	}
	if m[0]&1 != 0 {
		c.add(path, "%q: the first byte has the multicast bit set (it is odd), so no device can have such an address; write %s",
			s, MAC{m[0] &^ 1, m[1], m[2]})
	}
}

// name checks an overlay's name; names holds the index of those before it.
func (c *checker) name(path, name string, i int, names map[string]int) {
	if err := CheckName(name); err != nil {
		c.add(path, "%v", err)
		return
	}
	if first, ok := names[name]; ok {
		c.add(path, "%q is the name of overlays[%d] already; names must be unique", name, first)
		return
	}
	names[name] = i
}

// allow checks the names of overlays that may reach this one.
func (c *checker) allow(path string, o Overlay, names map[string]int) {
	if len(o.Allow) > 0 && o.Isolation.Mode() == IsolationNone {
		c.add(path, "without isolation there is nothing to allow; leave it out, or choose isolation overlay or strict")
		return
	}
	if len(o.Allow) > MaxAllow {
		c.add(path, "%d names, at most %d; put what so many have to reach into an overlay with isolation none", len(o.Allow), MaxAllow)
	}
	seen := map[string]bool{}
	for i, name := range o.Allow {
		at := fmt.Sprintf("%s[%d]", path, i)
		_, exists := names[name]
		switch {
		case name == o.Name:
			c.add(at, "%q is this overlay itself, whose containers always reach each other; leave it out", name)
		case !exists:
			c.add(at, "there is no overlay %q", name)
		case seen[name]:
			c.add(at, "%q is given twice", name)
		}
		seen[name] = true
	}
}

func (c *checker) overlay(path string, o Overlay) {
	if !o.Subnet.IsValid() && !o.Subnet6.IsValid() && o.Prefix == 0 && o.Prefix6 == 0 {
		c.add(path, "neither subnet nor subnet6 is given; an overlay needs one of them, or both")
		return
	}
	c.family(path, "subnet", "prefix", o.Subnet, o.Prefix, true)
	c.family(path, "subnet6", "prefix6", o.Subnet6, o.Prefix6, false)
	if o.Halves != "" && o.Halves != HalvesSplit && o.Halves != HalvesShared {
		c.add(path+".halves", "%.80q: want %s (Mesos and Docker have half of an agent subnet each) or %s (both draw from all of it)", o.Halves, HalvesSplit, HalvesShared)
	}
	if o.BlocksPerAgent < 0 || o.BlocksPerAgent > MaxBlocksPerAgent {
		c.add(path+".blocks_per_agent", "%d: want 1 to %d, or leave it out for %d; with 1 an agent never has more than one subnet",
			o.BlocksPerAgent, MaxBlocksPerAgent, DefaultBlocksPerAgent)
	}
}

// family checks one family of an overlay; prefix 0 means that it is not given.
func (c *checker) family(path, subnetKey, prefixKey string, subnet netip.Prefix, prefix int, v4 bool) {
	subnetKey, prefixKey = path+"."+subnetKey, path+"."+prefixKey
	longest := MaxPrefix6
	if v4 {
		longest = MaxPrefix
	}
	switch {
	case !subnet.IsValid() && prefix == 0:
		return
	case !subnet.IsValid():
		c.add(subnetKey, "missing, but its prefix %d is given; give both or neither", prefix)
		return
	}
	ok := c.subnet(subnetKey, subnet, v4)
	switch {
	case ok && subnet.Bits() > longest:
		c.add(subnetKey, "%s is too small to cut an agent subnet from; the smallest agent subnet is a /%d", subnet, longest)
	case prefix == 0:
		c.add(prefixKey, "missing; give the length of the subnet each agent gets from %s", subnet)
	case ok && prefix < subnet.Bits():
		c.add(prefixKey, "%d is shorter than the overlay %s; an agent subnet is a part of it, so use %d to %d", prefix, subnet, subnet.Bits(), longest)
	case ok && prefix > longest:
		c.add(prefixKey, "%d is too long: the halves would hold no container; use %d to %d", prefix, subnet.Bits(), longest)
	}
}

// subnet checks what every range has to keep, in itself and against the ranges
// before it. It reports whether the family is right.
func (c *checker) subnet(path string, p netip.Prefix, v4 bool) bool {
	key := path[strings.LastIndexByte(path, '.')+1:]
	switch {
	case p.Addr().Is4In6():
		c.add(path, "%s is an IPv4-mapped IPv6 range; write it as plain IPv4", p)
		return false
	case v4 && !p.Addr().Is4():
		c.add(path, "%s is IPv6, this field is for IPv4; write it as %s6", p, key)
		return false
	case !v4 && p.Addr().Is4():
		c.add(path, "%s is IPv4, this field is for IPv6; write it as %s", p, strings.TrimSuffix(key, "6"))
		return false
	}
	if p != p.Masked() {
		c.add(path, "%s has host bits set; write %s", p, p.Masked())
		p = p.Masked()
	}
	for _, u := range unusable() {
		if u.prefix.Overlaps(p) {
			c.add(path, "%s lies in or holds the %s range %s; choose another one", p, u.what, u.prefix)
			break
		}
	}
	for _, other := range c.ranges {
		if other.prefix.Overlaps(p) {
			c.add(path, "%s overlaps %s (%s); every range must be its own", p, other.path, other.prefix)
		}
	}
	c.ranges = append(c.ranges, pathPrefix{path, p})
	return true
}
