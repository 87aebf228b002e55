package ipam

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

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

// oldest finds the address of the ranges that was released first, if it has cooled
// in case that is asked for. Cooled ones outside every range of the half (left from
// an earlier lease) are dropped on the way.
func (h *half) oldest(f spans, cooled bool) (t ticket, ok bool, err error) {
	var drop []ticket
	err = h.each([]byte{kindQueue, family(f[0].first)}, func(k, payload []byte) (bool, error) {
		q, err := decodeTicket(k, payload)
		if err != nil {
			return false, err
		}
		rested := q.cooled(h.now, h.cool)
		switch {
		case cooled && !rested: // the queue is in order of release
			return false, nil
		case f.of(q.addr) != nil:
			t, ok = q, !h.elsewhere(q.addr)
			return !ok, nil
		case rested && h.spans.of(q.addr) == nil:
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

// A ticket is one entry of the queue of released addresses.
type ticket struct {
	key      []byte
	addr     netip.Addr
	released time.Duration
}

func encodeTicket(t ticket) []byte {
	return binary.BigEndian.AppendUint64(appendAddr(nil, t.addr), uint64(t.released))
}

func decodeTicket(key, payload []byte) (ticket, error) {
	r := reader{b: payload}
	t := ticket{key: append([]byte(nil), key...), addr: r.addr(), released: r.duration()}
	return t, r.end("released address")
}

// cooled reports whether the address has rested long enough.
func (t ticket) cooled(now, cooling time.Duration) bool { return now-t.released >= cooling }
