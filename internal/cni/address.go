package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/published"
	"overlayd.internal/overlay/ipam"
)

// gcAge spares a reservation whose ADD may still be on its way: the runtime
// that made GC's list may not have known it.
const gcAge = 60 * time.Second

// A statusError is an error that STATUS reports with another code than ADD.
type statusError struct {
	err    *types.Error
	status uint
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

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
	}
	return &statusError{Errorf(code, "%w", e), status}
}

// Attachment is the key of the call's address.
func (c *Call) Attachment() conf.Attachment {
	return conf.Attachment{Network: c.Conf.Name, ContainerID: c.ContainerID, IfName: c.IfName}
}

// AddressRequest is what to ask the store for: an address of every family the
// half has, by name where the runtime gave one.
func AddressRequest(c *Call, half conf.Half, o conf.AgentOverlay) (ipam.Request, error) {
	b := o.Bridge(half)
	if b == nil {
		return ipam.Request{}, Errorf(ErrCodeNoOverlay, "overlay %s has no bridge for the %s half on this host", o.Info.Name, half)
	}
	want, err := wantedAddrs(c)
	if err != nil {
		return ipam.Request{}, Errorf(types.ErrInvalidNetworkConfig, "requested address: %w", err)
	}
	return ipam.Request{Attachment: c.Attachment(), Half: half, Ranges: published.Ranges(b), Want: want}, nil
}

// wantedAddrs collects the four ways to ask for an address. Runtimes use more
// than one at a time for the same address.
func wantedAddrs(c *Call) ([]netip.Addr, error) {
	texts := slices.Concat(c.Conf.RuntimeConfig.IPs, c.Conf.Args.CNI.IPs)
	if len(c.Conf.Args.CNI.IPs) == 0 { // CNI's conventions: it outranks CNI_ARGS
		texts = append(texts, c.Args.IP...)
	}
	if info := c.Conf.Args.Mesos.NetworkInfo; info != nil {
		for _, a := range info.IPAddresses {
			if a.IPAddress != "" { // else only a protocol was asked for
				texts = append(texts, a.IPAddress)
			}
		}
	}
	all, err := conf.ParseAddrs(texts)
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, a := range all {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out, nil
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
	if checkPlace(c) != nil || !storeExists(c) {
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

// storeExists keeps verbs that only look, or take away, from making a store.
func storeExists(c *Call) bool {
	_, err := os.Lstat(filepath.Join(c.Conf.IPAMPath(), c.Conf.OverlayName()+".db"))
	return !errors.Is(err, fs.ErrNotExist)
}

// Addresses are the result's ips and routes: every address with the half's mask
// and gateway, and a default route for each family.
func Addresses(b *conf.Bridge, addrs []netip.Addr) (ips []*types100.IPConfig, routes []*types.Route) {
	for i, p := range published.Ranges(b) {
		if i >= len(addrs) {
			break
		}
		bits := p.Addr().BitLen()
		gateway := net.IP(conf.Gateway(p).AsSlice())
		ips = append(ips, &types100.IPConfig{
			Address: net.IPNet{IP: addrs[i].AsSlice(), Mask: net.CIDRMask(p.Bits(), bits)},
			Gateway: gateway,
		})
		routes = append(routes, &types.Route{
			Dst: net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)},
			GW:  gateway,
		})
	}
	return ips, routes
}

// PrevResult is the configuration's prevResult, whatever its version; nil if
// there is none.
func PrevResult(c *Call) (*types100.Result, error) {
	raw := c.Conf.PrevResult
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	if _, err := create.DecodeVersion(raw); err != nil {
		return nil, Errorf(types.ErrDecodingFailure, "configuration: prevResult: %w", err)
	}
	r, err := ParseResult(raw, c.Conf.CNIVersion)
	if err != nil {
		return nil, Errorf(types.ErrInvalidNetworkConfig, "configuration: prevResult: %w", err)
	}
	return r, nil
}

// ParseResult reads a result of any version. Many plugins leave the version
// out; then it is the configuration's. What it returns has no holes: no list
// has a null in it, every address and every destination is one.
func ParseResult(b []byte, version string) (*types100.Result, error) {
	var said map[string]any
	if err := json.Unmarshal(b, &said); err != nil {
		return nil, err
	}
	if v, _ := said["cniVersion"].(string); v != "" {
		version = v
	} else {
		if version == "" {
			version = defaultVersion
		}
		if said == nil { // "null"
			said = map[string]any{}
		}
		said["cniVersion"] = version
		b, _ = json.Marshal(said) // it was read from JSON
	}
	// The conversion between versions would meet the nulls.
	var lists struct{ Interfaces, IPs, Routes []*struct{} }
	if err := json.Unmarshal(b, &lists); err != nil {
		return nil, err
	}
	if slices.Contains(lists.Interfaces, nil) || slices.Contains(lists.IPs, nil) || slices.Contains(lists.Routes, nil) {
		return nil, errors.New("null in a list")
	}
	parsed, err := create.Create(version, b)
	if err != nil {
		return nil, err
	}
	r, err := types100.NewResultFromResult(parsed)
	if err != nil {
		return nil, err
	}
	for i, ip := range r.IPs {
		if !isNetwork(ip.Address) {
			return nil, fmt.Errorf("address %d is none", i+1)
		}
	}
	for i, route := range r.Routes {
		if !isNetwork(route.Dst) {
			return nil, fmt.Errorf("route %d leads nowhere", i+1)
		}
	}
	return r, nil
}

func isNetwork(n net.IPNet) bool {
	a, ok := netip.AddrFromSlice(n.IP)
	_, size := n.Mask.Size()
	return ok && size == a.Unmap().BitLen()
}

// CheckAddresses is CHECK of the store: the attachment has addresses in this
// half, and they are in prevResult.
func CheckAddresses(ctx context.Context, c *Call, half conf.Half) error {
	prev, err := PrevResult(c)
	if err != nil {
		return err
	}
	if prev == nil {
		return Errorf(types.ErrInvalidNetworkConfig, "configuration: prevResult: missing; CHECK compares with it")
	}
	var rec ipam.Record
	found := false
	if storeExists(c) {
		s, err := OpenStore(ctx, c, 0)
		if err != nil {
			return err
		}
		defer s.Close()
		if rec, found, err = s.Get(ctx, c.Attachment()); err != nil {
			return StoreError(err)
		}
	}
	if !found || rec.Half != half {
		return Errorf(ErrCodeMissing, "%s has no address in the %s half of overlay %s", c.Attachment(), half, c.Conf.OverlayName())
	}
	for _, a := range rec.Addrs {
		if !slices.ContainsFunc(prev.IPs, func(ip *types100.IPConfig) bool {
			b, ok := netip.AddrFromSlice(ip.Address.IP)
			return ok && b.Unmap() == a
		}) {
			return Errorf(ErrCodeMissing, "%s has address %s, which prevResult does not list", c.Attachment(), a)
		}
	}
	return nil
}

// GCKeep reads GC's list: which records of the network stay. A missing list is
// not an empty one, and two spellings that differ are no list.
func GCKeep(c *Call) (func(ipam.Record) bool, error) {
	list := c.Conf.ValidAttachments
	if list == nil {
		list = c.Conf.LegacyValidAttachments
	} else if old := c.Conf.LegacyValidAttachments; old != nil && !slices.Equal(*list, *old) {
		return nil, Errorf(types.ErrInvalidNetworkConfig, "configuration: cni.dev/valid-attachments and cni.dev/attachments differ")
	}
	if list == nil {
		return nil, Errorf(types.ErrInvalidNetworkConfig, "configuration: cni.dev/valid-attachments: missing; to release everything, give an empty list")
	}
	valid := make(map[conf.ValidAttachment]bool, len(*list))
	for _, a := range *list {
		valid[a] = true
	}
	now := conf.Boottime()
	return func(r ipam.Record) bool {
		return valid[conf.ValidAttachment{ContainerID: r.ContainerID, IfName: r.IfName}] || now-r.Since < gcAge
	}, nil
}

// GC releases the addresses of the network's attachments in one half that are
// not in GC's list.
func GC(ctx context.Context, c *Call, half conf.Half) error {
	keep, err := GCKeep(c)
	if err != nil {
		return err
	}
	if !storeExists(c) {
		return nil
	}
	s, err := OpenStore(ctx, c, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	_, err = s.GC(ctx, c.Conf.Name, half, keep)
	return StoreError(err)
}

// Status says whether ADD could have an address: published, leased, and not
// exhausted. The error has code 50 or 51.
func Status(ctx context.Context, c *Call, half conf.Half) error {
	state, err := LoadState(c.Conf)
	if err != nil {
		return StatusError(err)
	}
	o, b, err := Overlay(state, c.Conf.OverlayName(), half)
	if err != nil {
		return StatusError(err)
	}
	if !storeExists(c) {
		return StatusError(StoreError(ipam.CheckRoom(c.Conf.IPAMPath())))
	}
	s, err := OpenStore(ctx, c, state.CoolingSeconds)
	if err != nil {
		return StatusError(err)
	}
	defer s.Close()
	stats, err := s.Stats(ctx, half, published.Ranges(b))
	if err != nil {
		return StatusError(StoreError(err))
	}
	for _, st := range stats {
		if st.Used >= st.Total { // cooling addresses are used early
			return StatusError(StoreError(&ipam.ExhaustedError{Overlay: o.Info.Name, Half: half, Stats: st}))
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
