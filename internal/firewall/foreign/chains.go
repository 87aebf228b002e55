package foreign

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// Chain is a chain of nftables that others made and that drops what no rule of its
// table accepts.
type Chain struct {
	Family, Table, Name string
	Hook                string // forward or input
	// values are what the table's rules and sets compare with: names of devices,
	// addresses, ports.
	values []value
}

// value is what a rule compares with.
type value struct {
	data    string
	address bool // the beginning of an address, at least
}

// readChains lists the chains that drop by their policy, or by their last rule.
// Those of iptables are read by its own programs, firewalld is told.
func readChains() ([]Chain, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open a netlink socket for nftables: %w", err)
	}
	all, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list the chains of nftables: %w", err)
	}
	var out []Chain
	for _, ch := range all {
		hook := hookOf(ch)
		if hook == "" || ch.Table.Name == mark.NFTable || ch.Table.Name == mark.NFGuardTable || ch.Table.Name == "firewalld" || ch.Name == strings.ToUpper(hook) {
			continue
		}
		family, known := families[ch.Table.Family]
		if !known {
			continue
		}
		dropping := ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop
		if !dropping {
			rules, err := c.GetRules(ch.Table, ch)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("list the rules of chain %s of nftables: %w", ch.Name, err)
			}
			dropping = len(rules) > 0 && dropsAll(rules[len(rules)-1])
		}
		if !dropping {
			continue
		}
		values, err := valuesOf(c, ch.Table, all)
		if err != nil {
			return nil, err
		}
		out = append(out, Chain{Family: family, Table: ch.Table.Name, Name: ch.Name, Hook: hook, values: values})
	}
	return out, nil
}

var families = map[nftables.TableFamily]string{
	nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6",
}

func hookOf(c *nftables.Chain) string {
	switch {
	case c.Hooknum == nil || c.Type != nftables.ChainTypeFilter:
	case *c.Hooknum == *nftables.ChainHookForward:
		return "forward"
	case *c.Hooknum == *nftables.ChainHookInput:
		return "input"
	}
	return ""
}

// dropsAll reports whether a rule drops or refuses whatever reaches it.
func dropsAll(r *nftables.Rule) bool {
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Reject:
			return true
		case *expr.Verdict:
			return e.Kind == expr.VerdictDrop
		default:
			return false
		}
	}
	return false
}

// valuesOf is what a table compares with.
func valuesOf(c *nftables.Conn, table *nftables.Table, all []*nftables.Chain) (out []value, err error) {
	for _, ch := range all {
		if ch.Table.Name != table.Name || ch.Table.Family != table.Family {
			continue
		}
		rules, err := c.GetRules(table, ch)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list the rules of chain %s of nftables: %w", ch.Name, err)
		}
		for _, r := range rules {
			address := false
			for _, e := range r.Exprs {
				switch e := e.(type) {
				case *expr.Payload:
					address = e.Base == expr.PayloadBaseNetworkHeader && e.Offset >= 8
				case *expr.Meta:
					address = false
				case *expr.Cmp:
					out = append(out, value{string(e.Data), address})
				}
			}
		}
	}
	sets, err := c.GetSets(table)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the sets of table %s of nftables: %w", table.Name, err)
	}
	for _, s := range sets {
		elements, err := c.GetSetElements(s)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list set %s of nftables: %w", s.Name, err)
		}
		for _, e := range elements {
			out = append(out, value{string(e.Key), len(e.Key) == 4 || len(e.Key) == 16})
		}
	}
	return out, nil
}

// begins reports whether an address of a subnet begins so. A rule about 9.0.0.0/8
// looks at one byte.
func begins(s netip.Prefix, data string) bool {
	b := make([]byte, s.Addr().BitLen()/8)
	if len(data) == 0 || len(data) > len(b) {
		return false
	}
	copy(b, data)
	a, ok := netip.AddrFromSlice(b)
	return ok && s.Contains(a)
}

// knows reports whether the table has a rule about the overlays: then whoever
// wrote it has thought of them.
func (c Chain) knows(h Host) bool {
	for _, v := range c.values {
		name := strings.TrimRight(v.data, "\x00")
		for _, d := range h.Devices {
			// A pattern is compared as far as it goes.
			if name == d || len(name) > 1 && strings.HasPrefix(d, name) {
				return true
			}
		}
		if v.address && slices.ContainsFunc(h.Subnets, func(s netip.Prefix) bool { return begins(s, v.data) }) {
			return true
		}
		if c.Hook == "input" && len(v.data) == 2 && binary.BigEndian.Uint16([]byte(v.data)) == conf.VXLANPort {
			return true
		}
	}
	return false
}
