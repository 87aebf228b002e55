package ipam

import (
	"context"
	"fmt"

	bolt "go.etcd.io/bbolt"

	"overlayd.internal/overlay/conf"
)

func (s *Store) find(name conf.Half, k conf.Key) (rec Record, found bool, err error) {
	err = s.db.view(func(tx *bolt.Tx) error {
		h, err := s.half(tx, name)
		if err != nil {
			return err
		}
		if rec, found, err = h.attachment(k); !found || err != nil {
			return err
		}
		all := []Record{rec}
		err = h.addOrigins(all)
		rec = all[0]
		return err
	})
	return rec, found, err
}

// Get returns the record of an attachment, of either half.
func (s *Store) Get(ctx context.Context, a conf.Attachment) (Record, bool, error) {
	var rec Record
	var found bool
	err := s.run(ctx, func() (err error) {
		for _, name := range halfNames {
			if rec, found, err = s.find(conf.Half(name), a.Key()); found || err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return Record{}, false, fmt.Errorf("look up %s: %w", a, err)
	}
	return rec, found, nil
}

// List returns every record of both halves.
func (s *Store) List(ctx context.Context) ([]Record, error) {
	var out []Record
	err := s.run(ctx, func() error {
		out = nil
		return s.viewHalves(func(h *half) error {
			recs, err := h.attachments()
			if err == nil {
				err = h.addOrigins(recs)
			}
			out = append(out, recs...)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	return out, nil
}
