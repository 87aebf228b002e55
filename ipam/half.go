package ipam

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"

	"overlayd.internal/overlay/conf"
)

// bucketStore holds what concerns the whole file. The other two buckets are
// named after their half.
const bucketStore = "store"

// errUnchanged ends a transaction that turned out to have nothing to write.
var errUnchanged = errors.New("nothing changed")

// A half is one half's bucket within one transaction. It is a state machine
// over addresses:
//
//	never used --> in use --> released (cooling, then cooled) --> in use
//
// An address that is in use has a kindInUse entry and stands in the record of
// its attachment; a released one has a ticket in the queue and a kindReleased
// entry that points at it; a never-used one has neither.
type half struct {
	name conf.Half
	b    *bolt.Bucket
	seal sealer
	now  time.Duration
	cool time.Duration

	walk func() error // proves that the file is whole; nil: that is known

	spans      []*span
	sum, count uint64 // digest of all entries
	sumRead    bool
}

func openHalf(tx *bolt.Tx, name conf.Half, now, cool time.Duration) (*half, error) {
	b := tx.Bucket([]byte(name))
	if b == nil {
		return nil, damagef("bucket %s is missing", name)
	}
	return &half{name: name, b: b, seal: newSealer(string(name)), now: now, cool: cool}, nil
}

// Entries.

func (h *half) get(key []byte) ([]byte, error) {
	v := h.b.Get(key)
	if v == nil {
		return nil, nil
	}
	return h.seal.unseal(key, v)
}

func (h *half) put(key, payload []byte) error {
	if err := h.forget(key); err != nil {
		return err
	}
	v := h.seal.seal(key, payload)
	h.sum += fingerprint(key, v)
	h.count++
	if err := h.b.Put(key, v); err != nil {
		return fmt.Errorf("write address store: %w", err)
	}
	return nil
}

func (h *half) remove(key []byte) error {
	if err := h.forget(key); err != nil {
		return err
	}
	if err := h.b.Delete(key); err != nil {
		return fmt.Errorf("write address store: %w", err)
	}
	return nil
}

// forget takes the entry at key, if there is one, out of the digest.
func (h *half) forget(key []byte) error {
	if !h.sumRead {
		sum, count, err := h.readSum()
		if err != nil {
			return err
		}
		h.sum, h.count, h.sumRead = sum, count, true
	}
	if v := h.b.Get(key); v != nil {
		h.sum -= fingerprint(key, v)
		h.count--
	}
	return nil
}

func (h *half) readSum() (sum, count uint64, err error) {
	key := []byte{kindSum}
	v := h.b.Get(key)
	if v == nil {
		return 0, 0, damagef("half %s has no digest", h.name)
	}
	payload, err := h.seal.unseal(key, v)
	if err != nil {
		return 0, 0, err
	}
	r := reader{b: payload}
	sum, count = r.u64(), r.u64()
	return sum, count, r.end("digest")
}

// flush writes what is kept once per transaction: ranges and digest.
func (h *half) flush() error {
	for _, s := range h.spans {
		if !s.changed {
			continue
		}
		if err := h.put(rangeKey(s.prefix), encodeSpan(s)); err != nil {
			return err
		}
	}
	if !h.sumRead {
		return nil
	}
	return h.writeSum()
}

func (h *half) writeSum() error {
	key := []byte{kindSum}
	payload := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, h.sum), h.count)
	if err := h.b.Put(key, h.seal.seal(key, payload)); err != nil {
		return fmt.Errorf("write address store: %w", err)
	}
	return nil
}

// each calls fn for every entry whose key begins with prefix, in order, until
// fn returns false.
func (h *half) each(prefix []byte, fn func(key, payload []byte) (bool, error)) error {
	c := h.b.Cursor()
	for k, v := c.Seek(prefix); k != nil && bytes.HasPrefix(k, prefix); k, v = c.Next() {
		payload, err := h.seal.unseal(k, v)
		if err != nil {
			return err
		}
		if more, err := fn(k, payload); err != nil || !more {
			return err
		}
	}
	return nil
}

// between calls fn for every address of one kind from first to last.
func (h *half) between(kind byte, first, last netip.Addr, fn func(a netip.Addr)) error {
	end := addrKey(kind, last)
	c := h.b.Cursor()
	for k, _ := c.Seek(addrKey(kind, first)); k != nil && bytes.Compare(k, end) <= 0; k, _ = c.Next() {
		a, err := keyAddr(k)
		if err != nil {
			return err
		}
		fn(a)
	}
	return nil
}

// Attachments.

func (h *half) attachment(k conf.Key) (Record, bool, error) {
	payload, err := h.get(attachmentKey(k))
	if payload == nil || err != nil {
		return Record{}, false, err
	}
	rec, err := decodeRecord(h.name, k, payload)
	return rec, err == nil, err
}

func (h *half) attachments() ([]Record, error) {
	var out []Record
	err := h.each([]byte{kindAttachment}, func(k, payload []byte) (bool, error) {
		if len(k) != 17 {
			return false, damagef("attachment key %x has %d bytes", k, len(k))
		}
		rec, err := decodeRecord(h.name, conf.Key(k[1:]), payload)
		out = append(out, rec)
		return true, err
	})
	return out, err
}

// owner is the attachment that has the address in use.
func (h *half) owner(a netip.Addr) (conf.Key, bool, error) {
	payload, err := h.get(addrKey(kindInUse, a))
	if payload == nil || err != nil {
		return conf.Key{}, false, err
	}
	if len(payload) != len(conf.Key{}) {
		return conf.Key{}, false, damagef("owner of %s has %d bytes", a, len(payload))
	}
	return conf.Key(payload), true, nil
}

// bind gives free addresses to an attachment.
func (h *half) bind(rec Record) error {
	k := rec.Key()
	for _, a := range rec.Addrs {
		if err := h.put(addrKey(kindInUse, a), k[:]); err != nil {
			return err
		}
		h.countUsed(a, +1)
	}
	return h.put(attachmentKey(k), encodeRecord(rec))
}

// release takes an attachment's addresses back and lets them cool.
func (h *half) release(rec Record) error {
	k := rec.Key()
	if err := h.loadSpans(); err != nil {
		return err
	}
	for _, a := range rec.Addrs {
		owner, ok, err := h.owner(a)
		if err != nil {
			return err
		}
		if !ok || owner != k {
			return damagef("address %s of %s is not filed as its own", a, rec.Attachment)
		}
		if err := h.remove(addrKey(kindInUse, a)); err != nil {
			return err
		}
		h.countUsed(a, -1)
		if err := h.enqueue(a, h.now); err != nil {
			return err
		}
	}
	return h.remove(attachmentKey(k))
}

func (h *half) countUsed(a netip.Addr, by int) {
	for _, s := range h.spans {
		if s.contains(a) {
			s.used += uint64(by)
			s.changed = true
		}
	}
}

// The queue of released addresses, oldest first.

func (h *half) enqueue(a netip.Addr, released time.Duration) error {
	seq, err := h.b.NextSequence()
	if err != nil {
		return fmt.Errorf("write address store: %w", err)
	}
	if err := h.put(queueKey(family(a), seq), encodeTicket(ticket{addr: a, released: released})); err != nil {
		return err
	}
	return h.put(addrKey(kindReleased, a), binary.BigEndian.AppendUint64(nil, seq))
}

// ticketOf finds a released address in the queue.
func (h *half) ticketOf(a netip.Addr) (ticket, bool, error) {
	payload, err := h.get(addrKey(kindReleased, a))
	if payload == nil || err != nil {
		return ticket{}, false, err
	}
	r := reader{b: payload}
	seq := r.u64()
	if err := r.end("released address " + a.String()); err != nil {
		return ticket{}, false, err
	}
	key := queueKey(family(a), seq)
	payload, err = h.get(key)
	if err != nil {
		return ticket{}, false, err
	}
	if payload == nil {
		return ticket{}, false, damagef("released address %s is not in the queue", a)
	}
	t, err := decodeTicket(key, payload)
	if err == nil && t.addr != a {
		err = damagef("the queue has %s where %s should be", t.addr, a)
	}
	return t, err == nil, err
}

func (h *half) dequeue(t ticket) error {
	if err := h.remove(t.key); err != nil {
		return err
	}
	return h.remove(addrKey(kindReleased, t.addr))
}

// oldest finds the address of the range that was released first. Cooled ones
// outside every range (left from an earlier lease) are dropped on the way.
func (h *half) oldest(s *span) (t ticket, ok bool, err error) {
	var drop []ticket
	err = h.each([]byte{kindQueue, family(s.first)}, func(k, payload []byte) (bool, error) {
		q, err := decodeTicket(k, payload)
		if err != nil {
			return false, err
		}
		if s.contains(q.addr) {
			t, ok = q, true
			return false, nil
		}
		if q.cooled(h.now, h.cool) {
			drop = append(drop, q)
		}
		return true, nil
	})
	for _, q := range drop {
		if err == nil {
			err = h.dequeue(q)
		}
	}
	return t, ok, err
}

// cooling counts the addresses of a range that may not be used yet. The queue
// is in order of release, so this looks at those and one more.
func (h *half) cooling(s *span) (n uint64, err error) {
	prefix := []byte{kindQueue, family(s.first)}
	c := h.b.Cursor()
	step := c.Prev
	if k, _ := c.Seek([]byte{kindQueue, family(s.first) + 1}); k == nil {
		step = c.Last
	}
	for k, v := step(); k != nil && bytes.HasPrefix(k, prefix); k, v = c.Prev() {
		payload, err := h.seal.unseal(k, v)
		if err != nil {
			return 0, err
		}
		t, err := decodeTicket(k, payload)
		if err != nil {
			return 0, err
		}
		if t.cooled(h.now, h.cool) {
			break
		}
		if s.contains(t.addr) {
			n++
		}
	}
	return n, nil
}

// Ranges.

func (h *half) loadSpans() error {
	if h.spans != nil {
		return nil
	}
	return h.each([]byte{kindRange}, func(k, payload []byte) (bool, error) {
		s, err := decodeSpan(k, payload)
		h.spans = append(h.spans, s)
		return true, err
	})
}

// useRanges makes the stored ranges those of the request. A range that is new
// starts at its first address and counts what is in use in it already.
func (h *half) useRanges(want []netip.Prefix) ([]*span, error) {
	if err := h.loadSpans(); err != nil {
		return nil, err
	}
	stored := h.spans
	h.spans = make([]*span, 0, len(want))
	for _, p := range want {
		i := slices.IndexFunc(stored, func(s *span) bool { return s.prefix == p })
		if i >= 0 {
			h.spans = append(h.spans, stored[i])
			stored = slices.Delete(stored, i, i+1)
			continue
		}
		s, err := h.freshSpan(p)
		if err != nil {
			return nil, err
		}
		s.changed = true
		h.spans = append(h.spans, s)
	}
	for _, s := range stored {
		if err := h.remove(rangeKey(s.prefix)); err != nil {
			return nil, err
		}
	}
	return h.spans, nil
}

func (h *half) freshSpan(p netip.Prefix) (*span, error) {
	s := newSpan(p)
	err := h.between(kindInUse, s.first, s.last, func(netip.Addr) { s.used++ })
	return s, err
}

// Allocation.

func (h *half) allocate(o Options, r Request) (Allocation, error) {
	spans, err := h.useRanges(r.Ranges)
	if err != nil {
		return Allocation{}, err
	}
	rec, found, err := h.attachment(r.Key())
	if err != nil {
		return Allocation{}, err
	}
	if found && inSpans(rec.Addrs, spans) {
		a, err := h.existing(rec, r)
		if err != nil {
			return a, err
		}
		// Whoever decided to release an abandoned record must see that it is in use
		// again.
		rec.Since, rec.NetNS = h.now, r.NetNS
		return a, h.put(attachmentKey(rec.Key()), encodeRecord(rec))
	}
	if found { // of another lease: the addresses no longer lead here
		if err := h.release(rec); err != nil {
			return Allocation{}, err
		}
	}
	a := Allocation{}
	for _, s := range spans {
		var addr netip.Addr
		var early bool
		if want := wanted(r.Want, s); want.IsValid() {
			addr, early, err = h.takeNamed(s, want)
		} else {
			addr, early, err = h.takeNext(o, s)
		}
		if err != nil {
			return Allocation{}, err
		}
		a.Addrs = append(a.Addrs, addr)
		if early {
			s.early++
			s.changed = true
			a.Flush = append(a.Flush, addr)
		}
	}
	return a, h.bind(Record{Attachment: r.Attachment, Half: r.Half, Addrs: a.Addrs, BootID: o.BootID, Since: h.now, NetNS: r.NetNS})
}

// existing answers an attachment that has its addresses already.
func (h *half) existing(rec Record, r Request) (Allocation, error) {
	for _, want := range r.Want {
		if !slices.Contains(rec.Addrs, want) {
			return Allocation{}, &UnavailableError{want, fmt.Sprintf("cannot be given to %s, which has %v; delete it first", rec.Attachment, rec.Addrs)}
		}
	}
	for _, a := range rec.Addrs {
		if owner, ok, err := h.owner(a); err != nil {
			return Allocation{}, err
		} else if !ok || owner != rec.Key() {
			return Allocation{}, damagef("address %s of %s is not filed as its own", a, rec.Attachment)
		}
	}
	return Allocation{Addrs: rec.Addrs, Existing: true}, nil
}

// inSpans reports whether there is exactly one address for each range, in order.
func inSpans(addrs []netip.Addr, spans []*span) bool {
	if len(addrs) != len(spans) {
		return false
	}
	for i, s := range spans {
		if !s.contains(addrs[i]) {
			return false
		}
	}
	return true
}

func wanted(want []netip.Addr, s *span) netip.Addr {
	for _, a := range want {
		if a.BitLen() == s.first.BitLen() {
			return a
		}
	}
	return netip.Addr{}
}

func (h *half) takeNamed(s *span, a netip.Addr) (_ netip.Addr, early bool, err error) {
	if !s.contains(a) {
		return a, false, &UnavailableError{a, whyNot(s.prefix, a)}
	}
	owner, ok, err := h.owner(a)
	if err != nil {
		return a, false, err
	}
	if ok {
		rec, found, err := h.attachment(owner)
		if err == nil && !found {
			err = damagef("address %s belongs to %s, which is not stored", a, owner)
		}
		if err != nil {
			return a, false, err
		}
		return a, false, &UnavailableError{a, "is in use by " + rec.Attachment.String()}
	}
	t, ok, err := h.ticketOf(a)
	if err != nil {
		return a, false, err
	}
	if !ok {
		return a, false, h.proveAbsence()
	}
	return a, !t.cooled(h.now, h.cool), h.dequeue(t)
}

// proveAbsence makes sure that an address which is not filed is free. Damage can
// hide an entry: a page that has lost an element is sound in itself.
func (h *half) proveAbsence() error {
	if h.walk == nil {
		return nil
	}
	return h.walk()
}

func whyNot(p netip.Prefix, a netip.Addr) string {
	switch {
	case !p.Contains(a):
		return "is outside " + p.String()
	case a == p.Addr():
		return "is the network address of " + p.String()
	case a == conf.Gateway(p):
		return "is the gateway of " + p.String()
	}
	return "is the broadcast address of " + p.String()
}

// takeNext takes the next never-used address of the range, else the one that
// was released first.
func (h *half) takeNext(o Options, s *span) (a netip.Addr, early bool, err error) {
	if s.sparse() {
		if err := h.dropCooled(s); err != nil {
			return netip.Addr{}, false, err
		}
	}
	if a, ok, err := h.advance(s); ok || err != nil {
		return a, false, err
	}
	t, ok, err := h.oldest(s)
	if err != nil {
		return netip.Addr{}, false, err
	}
	if !ok {
		if s.sparse() && s.used < conf.Containers(s.prefix) {
			s.restart()
			if a, ok, err := h.advance(s); ok || err != nil {
				return a, false, err
			}
		}
		return netip.Addr{}, false, &ExhaustedError{Overlay: o.Overlay, Half: h.name, Stats: s.stats(0)}
	}
	if _, taken, err := h.owner(t.addr); err != nil {
		return netip.Addr{}, false, err
	} else if taken {
		return netip.Addr{}, false, damagef("address %s is both in use and released", t.addr)
	}
	return t.addr, !t.cooled(h.now, h.cool), h.dequeue(t)
}

// advance moves the frontier to behind the next address that is neither in use
// (somebody asked for it by name) nor released.
func (h *half) advance(s *span) (netip.Addr, bool, error) {
	for !s.full {
		a := s.frontier
		s.pass(a)
		if h.b.Get(addrKey(kindInUse, a)) != nil || h.b.Get(addrKey(kindReleased, a)) != nil {
			continue
		}
		// What the frontier has not reached was never given out, but by name, or
		// before the file was made anew: then more is in use than lies behind it.
		if s.used > s.behind(a) {
			if err := h.proveAbsence(); err != nil {
				return a, false, err
			}
		}
		return a, true, nil
	}
	return netip.Addr{}, false, nil
}

// dropCooled forgets two of the addresses that have rested, so that the queue of
// a sparse range does not grow for ever. The next lap finds them.
func (h *half) dropCooled(s *span) error {
	var drop []ticket
	if err := h.each([]byte{kindQueue, family(s.first)}, func(k, payload []byte) (bool, error) {
		t, err := decodeTicket(k, payload)
		if err != nil || !t.cooled(h.now, h.cool) {
			return false, err
		}
		drop = append(drop, t)
		return len(drop) < 2, nil
	}); err != nil {
		return err
	}
	for _, t := range drop {
		if err := h.dequeue(t); err != nil {
			return err
		}
	}
	return nil
}

// restAll releases everything and lets all of it rest from now on.
func (h *half) restAll() error {
	recs, err := h.attachments()
	if err != nil {
		return err
	}
	var old []ticket
	if err := h.each([]byte{kindQueue}, func(k, payload []byte) (bool, error) {
		t, err := decodeTicket(k, payload)
		old = append(old, t)
		return true, err
	}); err != nil {
		return err
	}
	for _, t := range old { // times of release are of another clock
		t.released = h.now
		if err := h.put(t.key, encodeTicket(t)); err != nil {
			return err
		}
	}
	for _, rec := range recs {
		if err := h.release(rec); err != nil {
			return err
		}
	}
	return nil
}
