package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
)

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
	if err := h.filed(); err != nil {
		return err
	}
	return h.removeOrigins()
}

// removeOrigins removes those that a program of an earlier release left.
func (h *half) removeOrigins() error {
	var keys [][]byte
	if err := h.each([]byte{kindOrigin}, func(k, _ []byte) (bool, error) {
		keys = append(keys, slices.Clone(k))
		return true, nil
	}); err != nil {
		return err
	}
	for _, k := range keys {
		if err := h.remove(k); err != nil {
			return err
		}
	}
	return nil
}

// collect releases the attachments that keep does not want.
func (h *half) collect(keep func(Record) bool) (out []Record, _ error) {
	recs, err := h.attachments()
	if err != nil {
		return nil, err
	}
	for _, rec := range recs {
		if keep(rec) {
			continue
		}
		if err := h.release(rec); err != nil {
			return nil, err
		}
		out = append(out, rec)
	}
	return out, nil
}

// Release takes the addresses of an attachment back, in both halves, and
// returns them. An attachment that has none is no error.
func (s *Store) Release(ctx context.Context, a conf.Attachment) ([]netip.Addr, error) {
	var out []netip.Addr
	err := s.run(ctx, func() error {
		out = nil
		err := s.updateHalves(func(h *half) (bool, error) {
			rec, found, err := h.attachment(a.Key())
			if err != nil || !found {
				return false, err
			}
			out = append(out, rec.Addrs...)
			return true, h.release(rec)
		})
		return s.confirmReleased(err, a.Key())
	})
	if err != nil {
		return nil, fmt.Errorf("release %s: %w", a, err)
	}
	return out, nil
}

// confirmReleased turns an unknown outcome into success if the attachments are
// gone.
func (s *Store) confirmReleased(err error, keys ...conf.Key) error {
	var unknown *unknownError
	if !errors.As(err, &unknown) || s.db == nil {
		return err
	}
	for _, k := range keys {
		for _, name := range halfNames {
			if _, found, ferr := s.find(conf.Half(name), k); ferr != nil {
				return fmt.Errorf("%w; read it back: %w", unknown, ferr)
			} else if found {
				return unknown
			}
		}
	}
	return nil
}

// GC releases the attachments of one network that the programs of one half have
// made and keep does not want, and returns them.
func (s *Store) GC(ctx context.Context, network string, by conf.Half, keep func(Record) bool) ([]Record, error) {
	var out []Record
	err := s.run(ctx, func() error {
		out = nil
		err := s.updateHalves(func(h *half) (bool, error) {
			released, err := h.collect(func(rec Record) bool { return rec.Network != network || rec.Half != by || keep(rec) })
			out = append(out, released...)
			return len(released) > 0, err
		})
		var keys []conf.Key
		for _, rec := range out {
			keys = append(keys, rec.Key())
		}
		return s.confirmReleased(err, keys...)
	})
	if err != nil {
		return nil, fmt.Errorf("collect garbage of network %s: %w", network, err)
	}
	return out, nil
}
