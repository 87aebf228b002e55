package antispoof

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// grace is how long an element stays that belongs to no link: a CNI program puts
// it in before there is one.
const grace = 30 * time.Second

// portsPerMessage bounds one transaction.
const portsPerMessage = 100

// Table keeps the table of a host. It is for the agent; it is not safe for
// concurrent use.
type Table struct {
	made  []byte // digest of the rules that were made
	stray map[element]time.Time
	// Forgotten is how much of what the last Set changed belonged to no port.
	Forgotten int
}

// Set makes the table and has these ports checked, and returns how much had to
// be changed. What belongs to no port is removed after a while, and what belongs to
// devices that are there and not checked at once: nothing gets through from them.
func (t *Table) Set(ports []Port, unchecked ...string) (changed int, err error) {
	t.Forgotten = 0
	c, err := open()
	if err != nil {
		return 0, err
	}
	defer c.Close()
	have, err := digest(c)
	if err != nil {
		return 0, err
	}
	if len(have) == 0 || string(have) != string(t.made) {
		var b rtnl.Batch
		makeTable(&b)
		if err := c.Transaction(&b); err != nil {
			return 0, fmt.Errorf("make table bridge %s, which checks what containers send: %w", mark.NFTable, err)
		}
		if t.made, err = digest(c); err != nil {
			return 0, err
		}
		// A new process finds what the last one made.
		if string(have) != string(t.made) {
			changed++
		}
	}
	there, err := elements(c)
	if err != nil {
		return changed, err
	}
	n, err := t.fill(c, ports, unchecked, there)
	return changed + n, err
}

// fill adds the elements that are missing and removes those that are too many
// for some time.
func (t *Table) fill(c *rtnl.Conn, ports []Port, unchecked []string, there map[element]bool) (changed int, err error) {
	wanted := map[element]bool{}
	var missing []Port
	for _, p := range ports {
		lacks := false
		for _, e := range p.elements() {
			wanted[e] = true
			lacks = lacks || !there[e]
		}
		if lacks {
			missing = append(missing, p)
		}
	}
	for part := range slices.Chunk(missing, portsPerMessage) {
		var b rtnl.Batch
		for _, p := range part {
			for _, e := range p.elements() {
				addElement(&b, e)
			}
		}
		if err := c.Transaction(&b); err != nil {
			return changed, fmt.Errorf("check what %s and others send: %w", part[0].Device, err)
		}
		changed += len(part)
	}
	free := map[string]bool{}
	for _, device := range unchecked {
		free[device] = true
	}
	stray := map[element]time.Time{}
	var old []element
	for e := range there {
		if wanted[e] {
			continue
		}
		since, known := t.stray[e]
		switch {
		case free[e.device()]:
			old = append(old, e)
		case !known:
			stray[e] = time.Now()
		case time.Since(since) < grace:
			stray[e] = since
		default:
			old = append(old, e)
		}
	}
	t.stray = stray
	for part := range slices.Chunk(old, portsPerMessage) {
		var b rtnl.Batch
		for _, e := range part {
			addElement(&b, e) // the kernel refuses to remove what is not there
			deleteElement(&b, e)
		}
		if err := c.Transaction(&b); err != nil {
			return changed, fmt.Errorf("forget what ports that are gone may send: %w", err)
		}
		t.Forgotten += len(part)
	}
	return changed + t.Forgotten, nil
}

// Remove takes the table away.
func (t *Table) Remove() (changed int, err error) {
	t.made, t.stray = nil, nil
	c, err := open()
	if err != nil {
		return 0, err
	}
	defer c.Close()
	chains, err := c.Objects("list chains", unix.NFPROTO_BRIDGE, unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, mark.NFTable, nil)
	if err != nil || len(chains) == 0 {
		return 0, err
	}
	var b rtnl.Batch
	begin(&b, "remove table bridge "+mark.NFTable, unix.NFT_MSG_DELTABLE, 0)
	b.AttrString(unix.NFTA_TABLE_NAME, mark.NFTable)
	if err := c.Transaction(&b); err != nil {
		return 0, err
	}
	return 1, nil
}

// digest is a hash of the chains and rules; nil where there are none.
func digest(c *rtnl.Conn) ([]byte, error) {
	h := sha256.New()
	found := false
	for _, kind := range []struct {
		step      string
		typ, attr uint16
		changing  []uint16
	}{
		{"list chains", unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, []uint16{unix.NFTA_CHAIN_HANDLE, unix.NFTA_CHAIN_USE, unix.NFTA_CHAIN_COUNTERS, chainID}},
		{"list rules", unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, []uint16{unix.NFTA_RULE_HANDLE, unix.NFTA_RULE_POSITION}},
	} {
		objects, err := c.Objects(kind.step, unix.NFPROTO_BRIDGE, kind.typ, kind.attr, mark.NFTable, nil)
		if err != nil {
			return nil, err
		}
		for _, o := range objects {
			found = true
			for _, typ := range slices.Sorted(maps.Keys(o)) {
				if !slices.Contains(kind.changing, typ) {
					fmt.Fprintf(h, "%d %x\n", typ, rtnl.WithoutCounters(o[typ]))
				}
			}
		}
	}
	if !found {
		return nil, nil
	}
	return h.Sum(nil), nil
}

// chainID is NFTA_CHAIN_ID of linux/netfilter/nf_tables.h.
const chainID = 11

// elements reads what the sets have.
func elements(c *rtnl.Conn) (map[element]bool, error) {
	out := map[element]bool{}
	for _, set := range []string{portsSet, sources4Set, sources6Set} {
		parts, err := c.Objects("list elements", unix.NFPROTO_BRIDGE, unix.NFT_MSG_GETSETELEM, unix.NFTA_SET_ELEM_LIST_TABLE, mark.NFTable,
			func(b *rtnl.Batch) { b.AttrString(unix.NFTA_SET_ELEM_LIST_SET, set) })
		if err != nil {
			return nil, err
		}
		rtnl.Elements(parts, func(key, _ []byte) { out[element{set, string(key)}] = true })
	}
	return out, nil
}
