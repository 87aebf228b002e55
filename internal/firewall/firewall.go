// Package firewall states the rules a host needs for its overlays and has them
// made by iptables or nftables.
//
// Build turns what the host should let through (Config) into a Ruleset: chains
// of typed rules, and sets for everything whose number grows with containers,
// peers or overlays. An implementation of Firewall makes the kernel what the
// Ruleset says. Both have chains and sets of their own and touch nothing else.
package firewall

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Firewall makes the rules of the network namespace it was opened in. It is not
// safe for concurrent use.
type Firewall interface {
	// Set makes the kernel what r says and returns how many chains and sets had
	// to be changed. There is no moment without rules: a chain is replaced in one
	// transaction. It reads what is there first, so that it also repairs.
	Set(ctx context.Context, r Ruleset) (changed int, err error)
	// Elements changes one set of the last Set, of a kind that Changes, in place. It
	// costs what is in add and remove, whatever is in the set. To add what is there, or remove what is
	// not, is no error.
	Elements(ctx context.Context, set string, add, remove []Element) error
	// Altered reports whether somebody changed what the last Set made, as far as
	// the kernel announces it to nobody. It is cheap, and may miss what Set finds.
	Altered() (bool, error)
	// Remove takes everything of ours away, and returns how much that was. The
	// administrator's chain stays if it has rules.
	Remove(ctx context.Context) (changed int, err error)
	// Name is iptables or nftables.
	Name() string
}

// Ruleset is everything that should be there.
type Ruleset struct {
	Chains []Chain // base chains and those they jump to
	Sets   []Set
	// IPv4 and IPv6 say which families rules are wanted for.
	IPv4, IPv6 bool
}

// Hook is where a chain is asked.
type Hook uint8

// The hooks.
const (
	NoHook      Hook = iota // only by a jump
	Raw                     // received packets, before connection tracking
	Input                   // packets to this host
	Forward                 // packets through this host
	Output                  // packets from this host
	Postrouting             // first packet of a connection, before it leaves: source translation
)

// Chain is a list of rules. A packet that no rule decides on goes on to what
// others have at the hook, or returns to the chain it came from.
type Chain struct {
	Name  string
	Hook  Hook
	Table Hook // of a chain without a hook: that of the chain that jumps to it
	// Foreign chains are made where they are missing, with no rule, and never
	// touched afterwards.
	Foreign bool
	Rules   []Rule
}

// Rule has an action for packets that match all fields given. Fields that are
// strings name a set, those that begin with Not match what is not in it. A rule
// about addresses stands for one of each family.
type Rule struct {
	In          string // device the packet came in by
	Out         string // device it leaves by
	Src         string // source address
	Dst, NotDst string // destination address
	// Pairs of an address and a device.
	SrcIn, NotSrcIn string // source, and device it came in by
	DstIn           string // destination, and device it came in by
	SrcOut          string // source, and device it leaves by

	InDevice    string // name of the one device it came in by
	NotLoopback bool   // it did not come from this host itself
	UDPPort     uint16 // destination port
	NotOthers   bool   // the destination is no host elsewhere: this one, or all of a link or group
	Established bool   // of a connection that was let through before, or about one
	Redirected  bool   // the destination was translated (a published port)
	ICMP        bool   // ICMP, or ICMPv6

	// Those of sets that the kernel fills. Only nftables has them.
	Toward  string // its next hop is an address of the set
	Hop     string // its next hop, and the device to that, are in the set
	AddHop  string // they are put into it
	OverSrc string // its source sends more of what reaches the rule than the set allows
	OverIn  string // so does the device that it came in by

	Action Action
	Chain  string // of Jump and Goto
}

// Action is what becomes of a packet.
type Action uint8

// The actions.
const (
	Accept Action = iota + 1
	Drop
	Return
	Jump
	Goto // as Jump, but the called chain returns to where this one would
	Masquerade
)

// Kind is what the elements of a set are.
type Kind uint8

// The kinds.
const (
	Addresses        Kind = iota + 1 // single addresses; tens of thousands are fine
	Prefixes                         // that do not overlap
	Devices                          // names
	PrefixesOnDevice                 // a prefix and a name
	SourcesOnDevice                  // the same; tens of thousands are fine
	Networks                         // prefixes that do not overlap; tens of thousands are fine
	NextHops                         // an address and a device, for a while
	LimitedSources                   // addresses, and how much they may send
	LimitedDevices                   // devices, the same
)

// ByKernel reports whether the kernel fills such a set.
func (k Kind) ByKernel() bool { return k == NextHops || k == LimitedSources || k == LimitedDevices }

// Changes reports whether the elements of such a set change by themselves, with
// Firewall.Elements.
func (k Kind) Changes() bool { return k == Addresses || k == SourcesOnDevice || k == Networks }

// OnDevice reports whether an element has a device beside its prefix.
func (k Kind) OnDevice() bool { return k == PrefixesOnDevice || k == SourcesOnDevice }

// Set is a named set. Its two families are kept apart by the implementations
// where the kernel wants that.
type Set struct {
	Name     string
	Kind     Kind
	Elements []Element
	// Patterns may stand for the names of a set of devices: a name, or the
	// beginning of one and a plus sign. No device of others should match.
	Patterns []string
	Stay     time.Duration // how long an element stays in a set that the kernel fills
	Limit    Limit         // of each element of such a set
}

// Limit is how many packets pass.
type Limit struct {
	PerSecond uint64
	Burst     uint32 // that pass at once
}

// Element is one element of a set; which fields count depends on the kind.
type Element struct {
	Prefix netip.Prefix // of an address: with all its bits
	Device string
}

// Address is the element for one address.
func Address(a netip.Addr) Element { return Element{Prefix: netip.PrefixFrom(a, a.BitLen())} }

// Of are the elements of one family, without duplicates, and all devices.
func (s Set) Of(ip6 bool) []Element {
	var of []Element
	for _, e := range s.Elements {
		if s.Kind == Devices || e.Prefix.Addr().Is6() == ip6 {
			of = append(of, e)
		}
	}
	if len(of) < 2 {
		return of
	}
	seen := make(map[Element]struct{}, len(of))
	return slices.DeleteFunc(of, func(e Element) bool {
		if _, twice := seen[e]; twice {
			return true
		}
		seen[e] = struct{}{}
		return false
	})
}

// HasAddresses reports whether the rule is about a family: where one has no
// addresses at all, its rules need not be there.
func (r Rule) HasAddresses() bool {
	return r.Src != "" || r.Dst != "" || r.NotDst != "" || r.SrcIn != "" || r.NotSrcIn != "" ||
		r.DstIn != "" || r.SrcOut != "" || r.ICMP || r.Toward != "" || r.Hop != "" || r.AddHop != "" || r.OverSrc != ""
}

// Set finds a set by its name.
func (r *Ruleset) Set(name string) (*Set, error) {
	for i := range r.Sets {
		if r.Sets[i].Name == name {
			return &r.Sets[i], nil
		}
	}
	return nil, fmt.Errorf("the ruleset has no set %q", name)
}

// Change adds and removes elements.
func (s *Set) Change(add, remove []Element) {
	if len(remove) == 0 {
		s.Elements = append(s.Elements, add...) // one that is there twice is one
		return
	}
	gone := make(map[Element]bool, len(add)+len(remove))
	for _, e := range slices.Concat(add, remove) {
		gone[e] = true
	}
	have := slices.DeleteFunc(slices.Clone(s.Elements), func(e Element) bool { return gone[e] })
	s.Elements = append(have, add...)
}

// Equal reports whether two rulesets say the same. The order of the elements of
// a set says nothing.
func (r Ruleset) Equal(o Ruleset) bool {
	return r.IPv4 == o.IPv4 && r.IPv6 == o.IPv6 &&
		slices.EqualFunc(r.Chains, o.Chains, func(a, b Chain) bool {
			return a.Name == b.Name && a.Hook == b.Hook && slices.Equal(a.Rules, b.Rules)
		}) &&
		slices.EqualFunc(r.Sets, o.Sets, func(a, b Set) bool {
			return a.Name == b.Name && a.Kind == b.Kind && a.Stay == b.Stay && a.Limit == b.Limit && sameElements(a.Elements, b.Elements)
		})
}

func sameElements(a, b []Element) bool {
	if slices.Equal(a, b) {
		return true
	}
	in := make(map[Element]bool, len(a))
	for _, e := range a {
		in[e] = true
	}
	seen := make(map[Element]bool, len(b))
	for _, e := range b {
		if !in[e] {
			return false
		}
		seen[e] = true
	}
	return len(seen) == len(in)
}
