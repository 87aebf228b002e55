package nftables

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/google/nftables"
)

// standardTables are those that iptables makes in nftables, with their base
// chains, when a program first asks for something in them. They stay when the
// last rule has gone.
var standardTables = []string{"filter", "nat", "mangle", "raw", "security"}

// Standard lists the tables and chains there are of those that iptables makes,
// as names for RemoveStandard.
func Standard() (names []string, err error) {
	c, err := connect()
	if err != nil {
		return nil, err
	}
	tables, err := listStandard(c)
	if err != nil {
		return nil, err
	}
	for _, t := range tables {
		names = append(names, tableName(t.table))
		for _, chain := range t.chains {
			names = append(names, chainName(chain))
		}
	}
	return names, nil
}

// RemoveStandard removes the tables and base chains that iptables made since
// Standard returned keep, as far as nothing is in them and they change nothing.
func RemoveStandard(keep []string) (removed int, err error) {
	c, err := connect()
	if err != nil {
		return 0, err
	}
	tables, err := listStandard(c)
	if err != nil {
		return 0, err
	}
	for _, t := range tables {
		left := len(t.chains)
		for _, chain := range t.chains {
			if slices.Contains(keep, chainName(chain)) || chain.Hooknum == nil || chain.Policy != nil && *chain.Policy != nftables.ChainPolicyAccept {
				continue
			}
			rules, err := c.GetRules(t.table, chain)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return 0, fmt.Errorf("nftables: list the rules of %s: %w", chainName(chain), err)
			}
			if len(rules) == 0 {
				c.DelChain(chain)
				removed++
				left--
			}
		}
		sets, err := c.GetSets(t.table)
		if err != nil {
			return 0, fmt.Errorf("nftables: list the sets of %s: %w", tableName(t.table), err)
		}
		if left == 0 && len(sets) == 0 && !slices.Contains(keep, tableName(t.table)) {
			c.DelTable(t.table)
			removed++
		}
	}
	if removed == 0 {
		return 0, nil
	}
	if err := c.Flush(); err != nil {
		return 0, fmt.Errorf("nftables: remove empty tables of iptables: %w", err)
	}
	return removed, nil
}

type standardTable struct {
	table  *nftables.Table
	chains []*nftables.Chain
}

func listStandard(c *nftables.Conn) (out []standardTable, err error) {
	tables, err := c.ListTables()
	if err != nil {
		return nil, fmt.Errorf("nftables: list tables: %w", err)
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("nftables: list chains: %w", err)
	}
	for _, t := range tables {
		family := t.Family == nftables.TableFamilyIPv4 || t.Family == nftables.TableFamilyIPv6
		if !family || !slices.Contains(standardTables, t.Name) {
			continue
		}
		s := standardTable{table: t}
		for _, chain := range chains {
			if chain.Table.Family == t.Family && chain.Table.Name == t.Name {
				s.chains = append(s.chains, chain)
			}
		}
		out = append(out, s)
	}
	return out, nil
}

func tableName(t *nftables.Table) string {
	family := "ip"
	if t.Family == nftables.TableFamilyIPv6 {
		family = "ip6"
	}
	return family + "/" + t.Name
}

func chainName(c *nftables.Chain) string { return tableName(c.Table) + "/" + c.Name }
