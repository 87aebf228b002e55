package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// checkPlace checks what the configuration says about where our files are.
func checkPlace(c *Call) error {
	if err := conf.CheckName(c.Conf.OverlayName()); err != nil {
		return Errorf(types.ErrInvalidNetworkConfig, "configuration: overlay: %w", err)
	}
	if dir := c.Conf.RunDirectory(); !filepath.IsAbs(dir) {
		return Errorf(types.ErrInvalidNetworkConfig, "configuration: runDir: %q is not an absolute path", dir)
	}
	return nil
}

// OpenStore opens the address store of the call's overlay. The caller closes
// it. The error has a CNI code.
func OpenStore(ctx context.Context, c *Call, coolingSeconds int) (*ipam.Store, error) {
	if err := checkPlace(c); err != nil {
		return nil, err
	}
	s, err := ipam.Open(ctx, ipam.Options{
		Dir:     c.Conf.IPAMPath(),
		Overlay: c.Conf.OverlayName(),
		BootID:  c.BootID,
		Cooling: time.Duration(coolingSeconds) * time.Second,
		Rebuild: c.Rebuild,
		// The others have looked whether there is one, which somebody may remove since.
		Existing: c.Command != "ADD",
	})
	if err != nil {
		return nil, StoreError(err)
	}
	c.reportRepair(s)
	return s, nil
}

func (c *Call) reportRepair(s *ipam.Store) {
	if text := s.Repaired(); text != "" {
		fmt.Fprintf(c.Stderr, "address store repaired: %s\n", text)
	}
}

// StoreError gives an error of the address store its CNI code. What has one
// keeps it; nil stays nil.
func StoreError(err error) error {
	var coded *types.Error
	var unavailable *ipam.UnavailableError
	var exhausted *ipam.ExhaustedError
	switch {
	case err == nil || errors.As(err, &coded):
		return err
	case errors.As(err, &unavailable):
		return Errorf(ErrCodeAddress, "requested %w", unavailable)
	case errors.As(err, &exhausted):
		return Errorf(types.ErrTryAgainLater, "%w", exhausted)
	case errors.Is(err, ipam.ErrDamaged):
		return Errorf(ErrCodeDamaged, "%w; stop this overlay's containers on this host, remove the file and start them again", err)
	}
	// Busy, full, read-only, out of descriptors: all of it passes.
	return Errorf(types.ErrTryAgainLater, "%w", err)
}

// Release gives back the addresses of the call's attachment, if it has any. It
// needs nothing but the store: not the published state, and of the
// configuration only the names. A store that was never made has nothing.
func Release(ctx context.Context, c *Call) ([]netip.Addr, error) {
	if checkPlace(c) != nil || !StoreExists(c) {
		return nil, nil // nothing can have been added with this configuration
	}
	s, err := OpenStore(ctx, c, 0)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	addrs, err := s.Release(ctx, c.Attachment())
	return addrs, StoreError(err)
}

// StoreExists reports whether the overlay has a store. It keeps verbs that only look,
// or take away, from making one.
func StoreExists(c *Call) bool {
	_, err := os.Lstat(filepath.Join(c.Conf.IPAMPath(), c.Conf.OverlayName()+".db"))
	return !errors.Is(err, fs.ErrNotExist)
}
