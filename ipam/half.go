package ipam

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
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
	rest *bolt.Bucket // of the other half; nil: the store is being made
	seal sealer
	now  time.Duration
	cool time.Duration

	walk func() error // proves that the file is whole; nil: that is known

	spans      spans
	sum, count uint64 // digest of all entries
	sumRead    bool
}

func openHalf(tx *bolt.Tx, name conf.Half, now, cool time.Duration) (*half, error) {
	b := tx.Bucket([]byte(name))
	if b == nil {
		return nil, damagef("bucket %s is missing", name)
	}
	return &half{name: name, b: b, rest: tx.Bucket([]byte(other(name))), seal: newSealer(string(name)), now: now, cool: cool}, nil
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
	rec, err := h.decode(k, payload)
	return rec, err == nil, err
}

// decode reads a record. That it is of the other half's program is an entry beside
// it, which programs of before leave alone.
func (h *half) decode(k conf.Key, payload []byte) (Record, error) {
	rec, err := decodeRecord(h.name, k, payload)
	if err != nil || h.b.Get(byKey(k)) == nil {
		return rec, err
	}
	rec.Pool, rec.Half = h.name, other(h.name)
	return rec, nil
}

func (h *half) attachments() ([]Record, error) {
	var out []Record
	err := h.each([]byte{kindAttachment}, func(k, payload []byte) (bool, error) {
		if len(k) != 17 {
			return false, damagef("attachment key %x has %d bytes", k, len(k))
		}
		rec, err := h.decode(conf.Key(k[1:]), payload)
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

// elsewhere reports whether an address is in use in the other half: of a container that
// was attached when the halves of the overlay were others.
func (h *half) elsewhere(a netip.Addr) bool {
	return h.rest != nil && h.rest.Get(addrKey(kindInUse, a)) != nil
}

// other is the other half.
func other(name conf.Half) conf.Half {
	if name == conf.Docker {
		return conf.Mesos
	}
	return conf.Docker
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
	return h.file(rec)
}

// file writes the record of an attachment, whose program's it is, and where its
// container is from.
func (h *half) file(rec Record) error {
	k := rec.Key()
	if err := h.fileBy(k, rec.Half); err != nil {
		return err
	}
	if err := h.put(attachmentKey(k), encodeRecord(rec)); err != nil {
		return err
	}
	if rec.Origin == (conf.Origin{}) {
		return h.removeOrigin(k)
	}
	return h.put(originKey(k), encodeOrigin(rec.Origin))
}

// fileBy keeps the mark of an attachment of the other half's program. One that is left
// of an attachment that is none any more is nobody's.
func (h *half) fileBy(k conf.Key, by conf.Half) error {
	marked := h.b.Get(byKey(k)) != nil
	switch {
	case by != h.name && !marked:
		return h.put(byKey(k), nil)
	case by == h.name && marked:
		return h.remove(byKey(k))
	}
	return nil
}

// removeOrigin does nothing where none is kept.
func (h *half) removeOrigin(k conf.Key) error {
	key := originKey(k)
	if h.b.Get(key) == nil {
		return nil
	}
	return h.remove(key)
}

// addOrigins completes records. What is kept of an attachment that is none any
// more, because a program of an earlier release has released it, is nobody's.
func (h *half) addOrigins(recs []Record) error {
	for i := range recs {
		payload, err := h.get(originKey(recs[i].Key()))
		if payload != nil && err == nil {
			recs[i].Origin, err = decodeOrigin(payload)
		}
		if err != nil {
			return err
		}
	}
	return nil
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
	if err := h.removeOrigin(k); err != nil {
		return err
	}
	if rec.Half != h.name {
		if err := h.remove(byKey(k)); err != nil {
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
