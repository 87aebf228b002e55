package nftables

import (
	"slices"

	"github.com/google/nftables"

	"overlayd.internal/overlay/internal/firewall"
)

// filter is the priority of our filters: before those of others, so that what
// is dropped here costs little.
const filter = -10

// chain is the library's form of a chain.
func (f *Firewall) chain(c firewall.Chain) *nftables.Chain {
	out := &nftables.Chain{Table: f.table, Name: c.Name}
	base := func(hook *nftables.ChainHook, priority nftables.ChainPriority, kind nftables.ChainType) {
		policy := nftables.ChainPolicyAccept
		out.Hooknum, out.Priority, out.Type, out.Policy = hook, &priority, kind, &policy
	}
	switch c.Hook {
	case firewall.Raw:
		base(nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw, nftables.ChainTypeFilter)
	case firewall.Input:
		base(nftables.ChainHookInput, filter, nftables.ChainTypeFilter)
	case firewall.Forward:
		base(nftables.ChainHookForward, filter, nftables.ChainTypeFilter)
	case firewall.Output:
		base(nftables.ChainHookOutput, filter, nftables.ChainTypeFilter)
	case firewall.Postrouting:
		base(nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource, nftables.ChainTypeNAT)
	}
	return out
}

// part is a set of the kernel: one of ours, or one family of it.
type part struct {
	set      *nftables.Set
	elements []nftables.SetElement
}

// parts are the sets of the kernel that one of ours needs.
func (f *Firewall) parts(s firewall.Set) []part {
	if s.Kind == firewall.LimitedDevices {
		return []part{{set: f.byKernel(s, s.Name, nftables.TypeIFIndex)}}
	}
	if s.Kind == firewall.Devices {
		p := part{set: &nftables.Set{Table: f.table, Name: s.Name, KeyType: nftables.TypeIFName}}
		for _, e := range s.Of(false) {
			p.elements = append(p.elements, nftables.SetElement{Key: device(e.Device)})
		}
		return []part{p}
	}
	var out []part
	for _, ip6 := range []bool{false, true} {
		p := part{set: &nftables.Set{Table: f.table, Name: setName(s.Name, ip6), KeyType: nftables.TypeIPAddr}}
		if ip6 {
			p.set.KeyType = nftables.TypeIP6Addr
		}
		if s.Kind.ByKernel() {
			out = append(out, part{set: f.byKernel(s, p.set.Name, p.set.KeyType)})
			continue
		}
		p.set.Interval = s.Kind != firewall.Addresses
		if s.Kind.OnDevice() {
			p.set.KeyType = nftables.MustConcatSetType(p.set.KeyType, nftables.TypeIFName)
			p.set.Concatenation = true
		}
		for _, e := range s.Of(ip6) {
			p.elements = append(p.elements, element(s.Kind, e)...)
		}
		out = append(out, p)
	}
	return out
}

// mostElements bounds a set that the kernel fills.
const mostElements = 1 << 16

// byKernel is a set that the kernel fills.
func (f *Firewall) byKernel(s firewall.Set, name string, key nftables.SetDatatype) *nftables.Set {
	out := &nftables.Set{Table: f.table, Name: name, KeyType: key, Dynamic: true, HasTimeout: true, Timeout: s.Stay, Size: mostElements}
	if s.Kind == firewall.NextHops {
		out.KeyType, out.Concatenation = nftables.MustConcatSetType(key, nftables.TypeIFIndex), true
	}
	return out
}

func setName(name string, ip6 bool) string {
	if ip6 {
		return name + "6"
	}
	return name + "4"
}

// device is a device name as the kernel compares it.
func device(name string) []byte {
	b := make([]byte, 16)
	copy(b, name)
	return b
}

// element is one element of an address set. An interval of one field is two
// elements, its first address and the first that is no longer in it; one of
// several fields has both ends in one element.
func element(kind firewall.Kind, e firewall.Element) []nftables.SetElement {
	first := e.Prefix.Masked().Addr().AsSlice()
	if kind == firewall.Addresses {
		return []nftables.SetElement{{Key: first}}
	}
	last := slices.Clone(first)
	for bit := e.Prefix.Bits(); bit < 8*len(last); bit++ {
		last[bit/8] |= 0x80 >> (bit % 8)
	}
	if kind.OnDevice() {
		d := device(e.Device)
		return []nftables.SetElement{{Key: append(first, d...), KeyEnd: append(last, d...)}}
	}
	out := []nftables.SetElement{{Key: first}}
	for i := len(last) - 1; i >= 0; i-- {
		if last[i]++; last[i] != 0 {
			return append(out, nftables.SetElement{Key: last, IntervalEnd: true})
		}
	}
	return out // up to the very last address
}
