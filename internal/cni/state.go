package cni

import (
	"context"
	"errors"
	"slices"

	"github.com/containernetworking/cni/pkg/types"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/published"
	"overlayd.internal/overlay/ipam"
)

// A statusError is an error that STATUS reports with another code than ADD.
type statusError struct {
	err    *types.Error
	status uint
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

// LoadState is published.Load of the configuration's run directory. The error of
// a state that does not allow new addresses has a CNI code; see StatusError for
// STATUS.
func LoadState(n conf.NetConf) (conf.State, error) {
	s, err := published.Load(n.RunDirectory())
	return s, stateError(err)
}

// Overlay is published.Overlay with CNI codes.
func Overlay(s conf.State, name string, half conf.Half) (conf.AgentOverlay, *conf.Bridge, error) {
	o, b, err := published.Overlay(s, name, half)
	return o, b, stateError(err)
}

// stateError gives an error of package published its CNI codes.
func stateError(err error) error {
	var e *published.Error
	if !errors.As(err, &e) {
		return err
	}
	code, status := ErrCodeNotReady, types.ErrPluginNotAvailable
	switch e.Reason {
	case published.Pending:
		code = types.ErrTryAgainLater
	case published.Expired:
		code, status = types.ErrTryAgainLater, types.ErrLimitedConnectivity
	case published.Lost:
		code, status = ErrCodeStaleState, types.ErrLimitedConnectivity
	case published.NoOverlay:
		code = ErrCodeNoOverlay
	case published.Draining:
		code = ErrCodeDraining
	}
	return &statusError{Errorf(code, "%w", e), status}
}

// Status says whether ADD could have an address: published, leased, and not
// exhausted. The error has code 50 or 51.
//
// ports says that a container takes a port of the half's bridge, so that there is
// room for no more than that has.
func Status(ctx context.Context, c *Call, half conf.Half, ports bool) error {
	state, err := LoadState(c.Conf)
	if err != nil {
		return StatusError(err)
	}
	o, _, err := Overlay(state, c.Conf.OverlayName(), half)
	if err != nil {
		return StatusError(err)
	}
	if !StoreExists(c) {
		return StatusError(StoreError(ipam.CheckRoom(c.Conf.IPAMPath())))
	}
	s, err := OpenStore(ctx, c, state.CoolingSeconds)
	if err != nil {
		return StatusError(err)
	}
	defer s.Close()
	stats, err := s.Stats(ctx, o.Info.Pool(half), o.Ranges(half))
	if err != nil {
		return StatusError(StoreError(err))
	}
	unfiled, err := s.Unfiled(ctx)
	if err == nil && slices.Contains(unfiled, o.Info.Pool(half)) {
		err = ipam.ErrUnfiled
	}
	if err != nil {
		return StatusError(StoreError(err))
	}
	for _, st := range ipam.Sum(stats) {
		if !ports {
			st.Total = st.Addresses()
		}
		if st.Used >= st.Total && (st.PortLimited() || !published.HasRoom(state, o.Info.Name)) { // cooling addresses are used early
			return StatusError(storeError(&ipam.ExhaustedError{Overlay: o.Info.Name, Half: half, Stats: st}, o))
		}
	}
	return nil
}

// StatusError turns an error of the other verbs into STATUS's: 51 where what
// runs is in danger too, 50 otherwise.
func StatusError(err error) error {
	if err == nil {
		return nil
	}
	code := types.ErrPluginNotAvailable
	var st *statusError
	var coded *types.Error
	if errors.As(err, &st) {
		code = st.status
	} else if errors.As(err, &coded) && coded.Code == types.ErrLimitedConnectivity {
		code = coded.Code
	}
	return Errorf(code, "%w", err)
}
