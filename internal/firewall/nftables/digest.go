package nftables

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// digest reads our table as the kernel sends it and returns a hash of what does
// not change by itself; nil where there is no table. Comparing it with that of
// the last Set finds every change that somebody else made, whatever it is. The
// rules of the administrator's chain do not count.
//
// Some sets may be large and change often. Their elements are
// returned as they are instead, by the name of the set. What the kernel puts into
// sets is not read at all.
func (f *Firewall) digest(r firewall.Ruleset) (sum []byte, addresses map[string]map[string]bool, err error) {
	addresses = map[string]map[string]bool{}
	for _, s := range r.Sets {
		if s.Kind.Changes() {
			for _, name := range []string{s.Name, setName(s.Name, false), setName(s.Name, true)} {
				addresses[name] = map[string]bool{}
			}
		}
	}
	c, err := rtnl.OpenFamily(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, nil, err
	}
	defer c.Close()
	if sum, err = (reader{c, f.table.Name}).digest(addresses); err != nil {
		return nil, nil, fmt.Errorf("nftables: read table inet %s: %w", f.table.Name, err)
	}
	return sum, addresses, nil
}

// filled reports whether the sets that change by themselves have the elements
// that they should.
func (f *Firewall) filled(r firewall.Ruleset, have map[string]map[string]bool) bool {
	for _, s := range r.Sets {
		if !s.Kind.Changes() {
			continue
		}
		for _, part := range f.parts(s) {
			got := have[part.set.Name]
			want := make(map[string]bool, len(part.elements)) // where one range ends another may begin
			for _, e := range part.elements {
				want[string(e.Key)+string(e.KeyEnd)] = true
			}
			if !maps.Equal(got, want) {
				return false
			}
		}
	}
	return true
}

// Attributes that x/sys/unix does not have, from linux/netfilter/nf_tables.h.
const (
	nftaChainID   = 11
	nftaSetHandle = 16
	nftaSetCount  = 20
)

// reader asks for what one table has.
type reader struct {
	*rtnl.Conn
	table string
}

func (r reader) digest(addresses map[string]map[string]bool) ([]byte, error) {
	user := zeroTerminated(mark.UserChain)
	var lines []string
	note := func(attrs map[uint16][]byte, drop ...uint16) {
		var b bytes.Buffer
		for _, typ := range slices.Sorted(maps.Keys(attrs)) {
			if !slices.Contains(drop, typ) {
				fmt.Fprintf(&b, " %d=%x", typ, rtnl.WithoutCounters(attrs[typ]))
			}
		}
		lines = append(lines, b.String())
	}
	chains, err := r.list("list chains", unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, nil)
	if err != nil || len(chains) == 0 {
		return nil, err
	}
	for _, c := range chains {
		note(c, unix.NFTA_CHAIN_HANDLE, unix.NFTA_CHAIN_USE, unix.NFTA_CHAIN_COUNTERS, nftaChainID)
	}
	sets, err := r.list("list sets", unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, nil)
	if err != nil {
		return nil, err
	}
	for _, s := range sets {
		note(s, nftaSetHandle, nftaSetCount)
		if flags := s[unix.NFTA_SET_FLAGS]; len(flags) == 4 && binary.BigEndian.Uint32(flags)&unix.NFT_SET_EVAL != 0 {
			continue
		}
		parts, err := r.list("list elements", unix.NFT_MSG_GETSETELEM, unix.NFTA_SET_ELEM_LIST_TABLE,
			func(b *rtnl.Batch) { b.Attr(unix.NFTA_SET_ELEM_LIST_SET, s[unix.NFTA_SET_NAME]...) })
		if err != nil {
			return nil, err
		}
		name := unix.ByteSliceToString(s[unix.NFTA_SET_NAME])
		keys := addresses[name]
		clear(keys)
		rtnl.Elements(parts, func(key, element []byte) {
			if keys == nil {
				lines = append(lines, fmt.Sprintf("%s %x", name, element))
			} else {
				keys[string(key)] = true
			}
		})
	}
	slices.Sort(lines) // sets and their elements come in any order, rules do not
	rules, err := r.list("list rules", unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, nil)
	if err != nil {
		return nil, err
	}
	for _, rule := range rules {
		if !bytes.Equal(rule[unix.NFTA_RULE_CHAIN], user) {
			note(rule, unix.NFTA_RULE_HANDLE, unix.NFTA_RULE_POSITION)
		}
	}
	h := sha256.New()
	for _, l := range lines {
		fmt.Fprintln(h, l)
	}
	return h.Sum(nil), nil
}

func (r reader) list(step string, typ, tableAttr uint16, more func(*rtnl.Batch)) ([]map[uint16][]byte, error) {
	return r.Objects(step, unix.NFPROTO_INET, typ, tableAttr, r.table, more)
}

func zeroTerminated(s string) []byte { return append([]byte(s), 0) }
