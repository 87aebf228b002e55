// Package nftables makes a firewall.Ruleset with nftables, by netlink alone: one
// table of family inet, whose chains and sets are replaced in one transaction of
// the kernel. No program is started.
package nftables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"

	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/mark"
)

// batch is how many elements one message gets: the library puts all elements of
// a call into one attribute, whose length has 16 bits, and what does not fit is
// lost without an error.
const batch = 500

// sendBuffer holds a transaction with the addresses of tens of thousands of
// peers.
const sendBuffer = 16 << 20

// Firewall is the implementation.
type Firewall struct {
	table  *nftables.Table
	owner  *owner            // of the table; nil: it belongs to nobody
	wanted *firewall.Ruleset // of the last Set; nil: make everything anew
	made   []byte            // digest of what the kernel had after it
}

// New opens nothing and changes nothing. The kernel is asked in the network
// namespace of the calling thread.
func New() *Firewall {
	return &Firewall{table: &nftables.Table{Name: mark.NFTable, Family: nftables.TableFamilyINet}}
}

// Name is nftables.
func (f *Firewall) Name() string { return "nftables" }

func connect() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(sendBuffer), c.SetReadBuffer(sendBuffer))
	}))
}

// Usable says why the kernel cannot do nftables, or nil.
func Usable() error {
	c, err := connect()
	if err == nil {
		_, err = c.ListTablesOfFamily(nftables.TableFamilyINet)
	}
	if err != nil {
		return fmt.Errorf("the kernel has no nftables: %w", err)
	}
	return nil
}

// Set is described with firewall.Firewall.
func (f *Firewall) Set(ctx context.Context, r firewall.Ruleset) (changed int, err error) {
	if len(r.Chains) == 0 {
		return f.Remove(ctx)
	}
	have, addresses, err := f.digest(r)
	if err != nil {
		return 0, err
	}
	filled := f.filled(r, addresses)
	if f.wanted != nil && f.wanted.Equal(r) && len(have) > 0 && bytes.Equal(have, f.made) && filled {
		return 0, nil
	}
	f.wanted = nil
	n, err := f.replace(r)
	f.lose(err)
	if err != nil {
		return 0, fmt.Errorf("nftables: replace the rules of table inet %s: %w", f.table.Name, err)
	}
	if f.made, _, err = f.digest(r); err != nil {
		return n, err
	}
	f.wanted = &r
	if filled && bytes.Equal(have, f.made) {
		return 0, nil // what an earlier process made
	}
	return n, nil
}

// replace makes everything anew in one transaction. The administrator's chain
// is only made where it is not there.
func (f *Firewall) replace(r firewall.Ruleset) (changed int, err error) {
	c, err := f.connect()
	if err != nil {
		return 0, err
	}
	chains, sets, err := f.present(c)
	if err != nil {
		return 0, err
	}
	if err := f.addTable(c); err != nil {
		return 0, err
	}
	wanted := map[string]bool{}
	for _, ch := range r.Chains {
		wanted[ch.Name] = true
		c.AddChain(f.chain(ch))
		if !ch.Foreign {
			c.FlushChain(&nftables.Chain{Table: f.table, Name: ch.Name})
		}
	}
	stale := maps.Clone(chains)
	maps.DeleteFunc(stale, func(name string, _ bool) bool { return wanted[name] })
	changed = f.removeChains(c, stale)
	made, err := f.makeSets(c, r.Sets, sets)
	if err != nil {
		return 0, err
	}
	for name := range sets {
		if made[name] == nil {
			c.DelSet(&nftables.Set{Table: f.table, Name: name})
			changed++
		}
	}
	for _, ch := range r.Chains {
		for _, rule := range ch.Rules {
			for _, exprs := range compile(rule, r, made) {
				c.AddRule(&nftables.Rule{Table: f.table, Chain: &nftables.Chain{Name: ch.Name}, Exprs: exprs})
			}
		}
	}
	return changed + len(r.Chains) + len(r.Sets), c.Flush()
}

// makeSets adds what is missing and fills all anew.
func (f *Firewall) makeSets(c *nftables.Conn, wanted []firewall.Set, have map[string]bool) (map[string]*nftables.Set, error) {
	made := map[string]*nftables.Set{}
	for _, s := range wanted {
		for _, part := range f.parts(s) {
			part.set.ID = uint32(len(made) + 1)
			made[part.set.Name] = part.set
			if err := c.AddSet(part.set, nil); err != nil {
				return nil, err
			}
			if have[part.set.Name] {
				c.FlushSet(part.set)
			}
			if err := addElements(c, part.set, part.elements); err != nil {
				return nil, err
			}
		}
	}
	return made, nil
}

// present lists what our table has.
func (f *Firewall) present(c *nftables.Conn) (chains, sets map[string]bool, err error) {
	chains, sets = map[string]bool{}, map[string]bool{}
	all, err := c.ListChainsOfTableFamily(f.table.Family)
	if err != nil {
		return nil, nil, fmt.Errorf("list chains: %w", err)
	}
	for _, ch := range all {
		if ch.Table.Name == f.table.Name {
			chains[ch.Name] = true
		}
	}
	if len(chains) == 0 {
		return chains, sets, nil
	}
	have, err := c.GetSets(f.table)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("list sets: %w", err)
	}
	for _, s := range have {
		if !s.Anonymous {
			sets[s.Name] = true
		}
	}
	return chains, sets, nil
}

func addElements(c *nftables.Conn, s *nftables.Set, elements []nftables.SetElement) error {
	for part := range slices.Chunk(elements, batch) {
		if err := c.SetAddElements(s, part); err != nil {
			return err
		}
	}
	return nil
}

// Elements is described with firewall.Firewall.
func (f *Firewall) Elements(_ context.Context, name string, add, remove []firewall.Element) error {
	if f.wanted == nil {
		return errors.New("nftables: no ruleset was set yet")
	}
	s, err := f.wanted.Set(name)
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	c, err := f.connect()
	if err != nil {
		return err
	}
	// To delete what is not there is an error for the kernel, so what is removed
	// is added first; both are one transaction.
	for _, part := range f.parts(firewall.Set{Name: name, Kind: s.Kind, Elements: remove}) {
		if err := addElements(c, part.set, part.elements); err != nil {
			return err
		}
		for chunk := range slices.Chunk(part.elements, batch) {
			if err := c.SetDeleteElements(part.set, chunk); err != nil {
				return err
			}
		}
	}
	for _, part := range f.parts(firewall.Set{Name: name, Kind: s.Kind, Elements: add}) {
		if err := addElements(c, part.set, part.elements); err != nil {
			return err
		}
	}
	if err := c.Flush(); err != nil {
		f.wanted = nil
		f.lose(err)
		return fmt.Errorf("nftables: change set %s: %w", name, err)
	}
	s.Change(add, remove)
	return nil
}

// Altered is described with firewall.Firewall: the kernel announces every change.
func (f *Firewall) Altered() (bool, error) { return false, nil }

// Remove is described with firewall.Firewall.
func (f *Firewall) Remove(context.Context) (changed int, err error) {
	f.wanted = nil
	c, err := f.connect()
	if err != nil {
		return 0, err
	}
	chains, sets, err := f.present(c)
	if err != nil || len(chains) == 0 {
		return 0, err
	}
	keep := false
	if chains[mark.UserChain] {
		rules, err := c.GetRules(f.table, &nftables.Chain{Table: f.table, Name: mark.UserChain})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, fmt.Errorf("nftables: list the rules of %s: %w", mark.UserChain, err)
		}
		keep = len(rules) > 0
	}
	if !keep {
		c.DelTable(f.table)
		changed = len(chains) + len(sets)
	} else {
		changed = f.removeOurs(c, chains, sets)
	}
	if changed == 0 {
		return 0, nil
	}
	if err := c.Flush(); err != nil {
		f.lose(err)
		return 0, fmt.Errorf("nftables: remove table inet %s: %w", f.table.Name, err)
	}
	return changed, nil
}

// removeOurs leaves the table with the administrator's chain.
func (f *Firewall) removeOurs(c *nftables.Conn, chains, sets map[string]bool) (changed int) {
	changed = f.removeChains(c, chains)
	for name := range sets {
		c.DelSet(&nftables.Set{Table: f.table, Name: name})
		changed++
	}
	return changed
}

// removeChains removes those that are ours. All are emptied before the first is
// removed, because they jump to each other.
func (f *Firewall) removeChains(c *nftables.Conn, chains map[string]bool) (changed int) {
	for name := range chains {
		if mark.IsOurChain(name) {
			c.FlushChain(&nftables.Chain{Table: f.table, Name: name})
		}
	}
	for name := range chains {
		if mark.IsOurChain(name) {
			c.DelChain(&nftables.Chain{Table: f.table, Name: name})
			changed++
		}
	}
	return changed
}
