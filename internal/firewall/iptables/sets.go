package iptables

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// maxElements is room for more hosts than a VTEP pool has.
const maxElements = 1 << 24

// sets are the sets of ipset, two for each of ours: one a family.
type sets struct {
	handle *netlink.Handle
	conn   *rtnl.Conn // of alter
}

func openSets() (sets, error) {
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return sets{}, fmt.Errorf("open a netlink socket for ipset: %w", err)
	}
	c, err := rtnl.OpenFamily(unix.NETLINK_NETFILTER)
	if err != nil {
		h.Close()
		return sets{}, fmt.Errorf("open a netlink socket for elements of ipset: %w", err)
	}
	return sets{h, c}, nil
}

func (s sets) close() {
	s.handle.Close()
	s.conn.Close()
}

func setName(name string, ip6 bool) string {
	if ip6 {
		return mark.SetPrefix + name + "6"
	}
	return mark.SetPrefix + name + "4"
}

// entry is one element as the kernel has it; comparable.
type entry struct {
	prefix netip.Prefix
	device string
}

// entries are the elements of one family.
func entries(s firewall.Set, ip6 bool) map[entry]bool {
	out := make(map[entry]bool, len(s.Elements))
	for _, e := range s.Of(ip6) {
		out[entry{e.Prefix.Masked(), e.Device}] = true
	}
	return out
}

// listed are elements of one family, some perhaps twice, which is no error when they
// are added or removed.
func listed(elements []firewall.Element, ip6 bool) (out []entry) {
	for _, e := range elements {
		if e.Prefix.Addr().Is6() == ip6 {
			out = append(out, entry{e.Prefix.Masked(), e.Device})
		}
	}
	return out
}

func typeOf(k firewall.Kind) string {
	switch k {
	case firewall.Addresses:
		return "hash:ip"
	case firewall.Prefixes, firewall.Networks:
		return "hash:net"
	}
	return "hash:net,iface"
}

// leftover is what a set has beside what is wanted.
type leftover struct {
	name    string
	kind    firewall.Kind
	entries []entry
	whole   bool // the set itself is not wanted
}

// fill makes the sets and adds what is missing. It returns what is left to be
// dropped when no rule of before asks for it any more.
func (s sets) fill(r firewall.Ruleset) (changed int, left []leftover, err error) {
	wanted := map[string]bool{}
	for _, set := range r.Sets {
		for _, ip6 := range []bool{false, true} {
			if ip6 && !r.IPv6 || !ip6 && !r.IPv4 || set.Kind == firewall.Devices {
				continue
			}
			name := setName(set.Name, ip6)
			wanted[name] = true
			have, err := s.read(name)
			if errors.Is(err, unix.ENOENT) {
				err = s.create(name, set.Kind, ip6)
			}
			if err != nil {
				return changed, nil, fmt.Errorf("ipset %s: %w", name, err)
			}
			want := entries(set, ip6)
			var missing []entry
			for e := range want {
				if !have[e] {
					missing = append(missing, e)
				}
			}
			if err := s.add(name, set.Kind, missing); err != nil {
				return changed, nil, err
			}
			l := leftover{name: name, kind: set.Kind}
			for e := range have {
				if !want[e] {
					l.entries = append(l.entries, e)
				}
			}
			if len(l.entries) > 0 {
				left = append(left, l)
			}
			if len(missing)+len(l.entries) > 0 {
				changed++
			}
		}
	}
	stale, err := s.names(wanted)
	for _, name := range stale {
		left = append(left, leftover{name: name, whole: true})
		changed++
	}
	return changed, left, err
}

func (s sets) create(name string, kind firewall.Kind, ip6 bool) error {
	o := netlink.IpsetCreateOptions{Family: unix.AF_INET, MaxElements: maxElements}
	if ip6 {
		o.Family = unix.AF_INET6
	}
	err := s.handle.IpsetCreate(name, typeOf(kind), o)
	if err != nil {
		return fmt.Errorf("create (type %s; the kernel needs ip_set): %w", typeOf(kind), err)
	}
	return nil
}

// read returns what a set has.
func (s sets) read(name string) (map[entry]bool, error) {
	r, err := s.handle.IpsetList(name)
	if err != nil {
		return nil, err
	}
	out := make(map[entry]bool, len(r.Entries))
	for _, e := range r.Entries {
		a, ok := netip.AddrFromSlice(e.IP)
		if !ok {
			continue
		}
		bits := int(e.CIDR)
		if bits == 0 {
			bits = a.BitLen()
		}
		out[entry{netip.PrefixFrom(a, bits), e.IFace}] = true
	}
	return out, nil
}

// drop takes away what fill left.
func (s sets) drop(left []leftover) error {
	for _, l := range left {
		if err := s.remove(l.name, l.kind, l.entries); err != nil {
			return err
		}
		if l.whole {
			if err := s.handle.IpsetDestroy(l.name); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("ipset %s: destroy: %w", l.name, err)
			}
		}
	}
	return nil
}

// change adds and removes elements of one set.
func (s sets) change(of firewall.Set, add, remove []firewall.Element) error {
	for _, ip6 := range []bool{false, true} {
		name := setName(of.Name, ip6)
		if err := s.remove(name, of.Kind, listed(remove, ip6)); err != nil {
			return err
		}
		if err := s.add(name, of.Kind, listed(add, ip6)); err != nil {
			return err
		}
	}
	return nil
}

// names lists our sets but those in keep. They are asked for one by one, because
// a host may have large sets of others.
func (s sets) names(keep map[string]bool) (out []string, err error) {
	for _, name := range firewall.SetNames() {
		for _, ip6 := range []bool{false, true} {
			name := setName(name, ip6)
			if keep[name] {
				continue
			}
			_, err := s.handle.IpsetList(name)
			switch {
			case err == nil:
				out = append(out, name)
			case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
				return nil, nil // a kernel without ip_set has none
			case !errors.Is(err, unix.ENOENT):
				return nil, fmt.Errorf("ipset %s: look for it (the kernel needs ip_set): %w", name, err)
			}
		}
	}
	return out, nil
}

// destroy removes our sets but those in keep.
func (s sets) destroy(keep map[string]bool) (changed int, err error) {
	stale, err := s.names(keep)
	if err != nil {
		return 0, err
	}
	for _, name := range stale {
		if err := s.drop([]leftover{{name: name, whole: true}}); err != nil {
			return changed, err
		}
		changed++
	}
	return changed, nil
}
