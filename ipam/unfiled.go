package ipam

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"overlayd.internal/overlay/conf"
)

// A file that is made anew knows what the kernel's links tell. Those that Docker makes
// tell nothing: until the agent has asked dockerd whose address is whose, nothing is
// free in the pool that they draw from, and none of its blocks is empty.

// Known is what the kernel knows of the attachments of an overlay.
type Known struct {
	Records []Record
	// Unfiled are the pools of which containers of Docker have addresses that are not
	// in Records.
	Unfiled []conf.Half
}

// ErrUnfiled: nothing is given out before Filed was called. Try again later.
var ErrUnfiled = errors.New("the address store was made anew, and addresses that containers of Docker have are not in it yet; the agent files them as soon as dockerd answers")

var unfiledKey = []byte{kindUnfiled}

func (h *half) isUnfiled() bool { return h.b.Get(unfiledKey) != nil }

// Unfiled are the pools that wait for Filed.
func (s *Store) Unfiled(ctx context.Context) (out []conf.Half, _ error) {
	err := s.run(ctx, func() error {
		out = nil
		return s.viewHalves(func(h *half) error {
			if h.isUnfiled() {
				out = append(out, h.name)
			}
			return nil
		})
	})
	return out, err
}

// Filed says that the addresses of Docker's containers are in these pools now.
func (s *Store) Filed(ctx context.Context, pools []conf.Half) error {
	err := s.run(ctx, func() error {
		return s.updateHalves(func(h *half) (bool, error) {
			if !slices.Contains(pools, h.name) || !h.isUnfiled() {
				return false, nil
			}
			return true, h.filed()
		})
	})
	if err != nil {
		return fmt.Errorf("give out addresses of %v again: %w", pools, err)
	}
	return nil
}

func (h *half) filed() error {
	if !h.isUnfiled() {
		return nil
	}
	return h.remove(unfiledKey)
}
