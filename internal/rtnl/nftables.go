package rtnl

import (
	"bytes"
	"errors"
	"slices"

	"golang.org/x/sys/unix"
)

// Objects lists the objects of one kind that a table of nftables has: the
// attributes of each, by their numbers. typ is the message that asks for them,
// tableAttr the attribute that names their table. Where the table is not there
// it has none.
func (c *Conn) Objects(step string, family byte, typ, tableAttr uint16, table string, more func(*Batch)) ([]map[uint16][]byte, error) {
	name := append([]byte(table), 0)
	out, err := List(c, Request{
		Step: step, Type: unix.NFNL_SUBSYS_NFTABLES<<8 | typ,
		Header: []byte{family, unix.NFNETLINK_V0, 0, 0},
		Attrs: func(b *Batch) {
			b.Attr(tableAttr, name...)
			if more != nil {
				more(b)
			}
		},
	}, func(m Message) (map[uint16][]byte, bool) {
		attrs := map[uint16][]byte{}
		EachAttr(slices.Clone(m.Data[min(len(m.Data), 4):]), func(typ uint16, data []byte) { attrs[typ] = data })
		return attrs, bytes.Equal(attrs[tableAttr], name)
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	return out, err
}

// counter is the name of the expression that counts. Its data follows: a header,
// then two attributes of eight bytes, with padding.
var counter = append([]byte("counter"), 0)

// WithoutCounters zeroes what the counters among the expressions of a rule have
// counted, so that rules can be compared.
func WithoutCounters(b []byte) []byte {
	const header, size = 4, 2*(4+8) + 4
	if !bytes.Contains(b, counter) {
		return b
	}
	b = slices.Clone(b)
	for at := 0; ; {
		i := bytes.Index(b[at:], counter)
		if i < 0 {
			return b
		}
		from := min(at+i+len(counter)+header, len(b))
		at = min(from+size, len(b))
		clear(b[from:at])
	}
}

// nftaSetElemKeyEnd is NFTA_SET_ELEM_KEY_END of linux/netfilter/nf_tables.h.
const nftaSetElemKeyEnd = 10

// Elements calls fn for the key of every element in the objects that
// NFT_MSG_GETSETELEM lists, which of a range has its end after its beginning, and
// with the element as a whole.
func Elements(parts []map[uint16][]byte, fn func(key, element []byte)) {
	for _, p := range parts {
		EachAttr(p[unix.NFTA_SET_ELEM_LIST_ELEMENTS], func(_ uint16, element []byte) {
			var key []byte
			EachAttr(element, func(typ uint16, data []byte) {
				if typ == unix.NFTA_SET_ELEM_KEY || typ == nftaSetElemKeyEnd { // in this order
					EachAttr(data, func(_ uint16, data []byte) { key = append(key, data...) })
				}
			})
			fn(key, element)
		})
	}
}
