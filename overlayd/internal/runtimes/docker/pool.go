package docker

import (
	"fmt"
	"net/netip"
	"strings"

	"overlayd.internal/overlay/conf"
)

// A pool is what an IPAM driver calls the range that a network's addresses are
// taken from. Docker stores the pool's ID with the network and passes it with
// every request, so the ID says everything and the driver remembers nothing:
//
//	overlay/<name>/<prefix>[/<part>]
type pool struct {
	overlay string
	prefix  netip.Prefix // the overlay's half here, or a bystander
	part    netip.Prefix // of --ip-range; zero: addresses come from all of prefix
}

const poolMark = "overlay"

func (p pool) id() string {
	id := fmt.Sprintf("%s/%s/%s", poolMark, p.overlay, p.prefix)
	if p.part.IsValid() {
		id += "/" + p.part.String()
	}
	return id
}

func parsePool(id string) (pool, error) {
	f := strings.Split(id, "/")
	if len(f) != 4 && len(f) != 6 || f[0] != poolMark || conf.CheckName(f[1]) != nil {
		return pool{}, fmt.Errorf("pool %q is not one of this driver's", id)
	}
	p := pool{overlay: f[1]}
	var err error
	if p.prefix, err = parsePrefix(f[2] + "/" + f[3]); err != nil {
		return pool{}, fmt.Errorf("pool %q: %w", id, err)
	}
	if len(f) == 6 {
		if p.part, err = parsePrefix(f[4] + "/" + f[5]); err != nil {
			return pool{}, fmt.Errorf("pool %q: %w", id, err)
		}
		if !within(p.part, p.prefix) {
			return pool{}, fmt.Errorf("pool %q: %s is not a part of %s", id, p.part, p.prefix)
		}
	}
	return p, nil
}

// from is what addresses are taken from when none is asked for by name.
func (p pool) from() netip.Prefix {
	if p.part.IsValid() {
		return p.part
	}
	return p.prefix
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() || conf.Containers(p) == 0 {
		return netip.Prefix{}, fmt.Errorf("%q is not a subnet with addresses for containers, as in 9.0.1.128/25", s)
	}
	return p.Masked(), nil
}

// within reports whether all of a is in b.
func within(a, b netip.Prefix) bool { return a.Bits() >= b.Bits() && b.Contains(a.Addr()) }

// bystanders are IPv4 addresses for the networks of overlays that have only
// IPv6. Engines before 28 insist on IPv4 in every network. These addresses are
// link-local, so that every program prefers the other one, and lead nowhere
// but to the containers on the same bridge.
var bystanders = netip.MustParsePrefix("169.254.0.0/16")

// bystanderBits is the length of one network's part of them.
const bystanderBits = 22

// isBystander reports whether a subnet is one of them.
func isBystander(p netip.Prefix) bool { return p.Addr().Is4() && within(p, bystanders) }

// bystander chooses the part for an overlay: one that follows from its name, or
// the next that is not among the taken ones. The cloud's metadata service at
// 169.254.169.254 stays reachable; first and last block are reserved.
func bystander(overlay string, taken []netip.Prefix) netip.Prefix {
	const blocks = 1 << (bystanderBits - 16)
	sum := 0
	for _, c := range []byte(overlay) {
		sum = sum*31 + int(c)
	}
	metadata := netip.AddrFrom4([4]byte{169, 254, 169, 254})
	for i := range blocks {
		b := bystanders.Addr().As4()
		n := uint16((uint(sum) + uint(i)) % blocks << (32 - bystanderBits))
		b[2], b[3] = byte(n>>8), byte(n)
		p := netip.PrefixFrom(netip.AddrFrom4(b), bystanderBits)
		last := conf.LastAddr(bystanders)
		if p.Contains(bystanders.Addr()) || p.Contains(last) || p.Contains(metadata) || overlaps(p, taken) {
			continue
		}
		return p
	}
	return netip.Prefix{}
}

func overlaps(p netip.Prefix, all []netip.Prefix) bool {
	for _, q := range all {
		if p.Overlaps(q) {
			return true
		}
	}
	return false
}
