package ipam

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
)

// Verify looks at everything in the store and says what is wrong, a line for
// each; none: nothing. It changes nothing and never repairs. The cost grows
// with the size of the store.
func (s *Store) Verify(ctx context.Context) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.db == nil {
		return nil, fmt.Errorf("verify address store: it is closed")
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("verify address store: %w", err)
	}
	if err := s.walk(); err != nil {
		return []string{err.Error()}, nil // nothing in it can be relied on
	}
	var v verifier
	if err := s.viewHalves(func(h *half) error { return v.half(h, s.o.BootID) }); err != nil {
		v.problem("%v", err)
	}
	return v.problems, nil
}

type verifier struct{ problems []string }

func (v *verifier) problem(format string, args ...any) {
	v.problems = append(v.problems, fmt.Sprintf(format, args...))
}

func (v *verifier) half(h *half, boot string) error {
	recs, err := h.attachments()
	if err != nil {
		return err
	}
	inUse := map[netip.Addr]conf.Key{}
	if err := h.each([]byte{kindInUse}, func(k, payload []byte) (bool, error) {
		a, err := keyAddr(k)
		if err == nil && len(payload) != len(conf.Key{}) {
			err = damagef("owner of %s has %d bytes", a, len(payload))
		}
		if err == nil {
			inUse[a] = conf.Key(payload)
		}
		return true, err
	}); err != nil {
		return err
	}
	released, err := v.queue(h)
	if err != nil {
		return err
	}
	v.owners(h, recs, maps.Clone(inUse), boot)
	for a := range inUse {
		if released[a] {
			v.problem("%s half: %s is both in use and released", h.name, a)
		}
	}
	return v.ranges(h, inUse, released)
}

// owners compares the attachments with the addresses in use.
func (v *verifier) owners(h *half, recs []Record, inUse map[netip.Addr]conf.Key, boot string) {
	for _, rec := range recs {
		if rec.BootID != boot {
			v.problem("%s half: %s is of boot %s, this is %s", h.name, rec.Attachment, rec.BootID, boot)
		}
		if len(rec.Addrs) == 0 {
			v.problem("%s half: %s has no address", h.name, rec.Attachment)
		}
		for _, a := range rec.Addrs {
			if inUse[a] != rec.Key() {
				v.problem("%s half: %s of %s is not filed as its own", h.name, a, rec.Attachment)
			}
			delete(inUse, a)
		}
	}
	for a, k := range inUse {
		v.problem("%s half: %s is in use by %s, which does not have it", h.name, a, k)
	}
}

// queue compares the tickets with the released addresses.
func (v *verifier) queue(h *half) (map[netip.Addr]bool, error) {
	seqs := map[netip.Addr]uint64{}
	if err := h.each([]byte{kindReleased}, func(k, payload []byte) (bool, error) {
		a, err := keyAddr(k)
		if err == nil && len(payload) != 8 {
			err = damagef("released address %s: %d bytes", a, len(payload))
		}
		if err == nil {
			seqs[a] = binary.BigEndian.Uint64(payload)
		}
		return true, err
	}); err != nil {
		return nil, err
	}
	released := map[netip.Addr]bool{}
	last := map[byte]time.Duration{}
	err := h.each([]byte{kindQueue}, func(k, payload []byte) (bool, error) {
		t, err := decodeTicket(k, payload)
		if err != nil {
			return false, err
		}
		fam := family(t.addr)
		seq, ok := seqs[t.addr]
		if !ok || !bytes.Equal(k, queueKey(fam, seq)) || released[t.addr] {
			v.problem("%s half: the queue and the released addresses differ about %s", h.name, t.addr)
		}
		if seq > h.b.Sequence() {
			v.problem("%s half: %s has number %d in the queue, which was not given out yet", h.name, t.addr, seq)
		}
		if t.released < last[fam] {
			v.problem("%s half: %s stands behind addresses released later", h.name, t.addr)
		}
		last[fam] = t.released
		released[t.addr] = true
		return true, nil
	})
	if err == nil && len(released) != len(seqs) {
		v.problem("%s half: %d addresses are released and %d are queued", h.name, len(seqs), len(released))
	}
	return released, err
}

// ranges counts again, and checks that what lies below a frontier is known.
func (v *verifier) ranges(h *half, inUse map[netip.Addr]conf.Key, released map[netip.Addr]bool) error {
	if err := h.loadSpans(); err != nil {
		return err
	}
	known := slices.Collect(maps.Keys(inUse))
	known = slices.AppendSeq(known, maps.Keys(released))
	slices.SortFunc(known, netip.Addr.Compare)
	for _, s := range h.spans {
		used := uint64(0)
		for a := range inUse {
			if s.contains(a) {
				used++
			}
		}
		if used != s.used {
			v.problem("%s half: %s counts %d in use, there are %d", h.name, s.prefix, s.used, used)
		}
		if s.sparse() {
			continue // it forgets what has rested
		}
		next := s.first // walks the known addresses up to the frontier
		for _, a := range known {
			if !s.contains(a) || !s.full && a.Compare(s.frontier) >= 0 {
				continue
			}
			if a != next {
				v.problem("%s half: %s was handed out and forgotten", h.name, next)
			}
			next = a.Next()
		}
		if end := s.frontier; !s.full && next != end || s.full && next != s.last.Next() {
			v.problem("%s half: the frontier of %s is %s, addresses are known up to %s", h.name, s.prefix, end, next)
		}
	}
	return nil
}
