package audit

import (
	"errors"
	"io/fs"
	"net/netip"
	"path/filepath"

	"overlayd.internal/overlay/conf"
)

// PeersFile is the file in the state directory in which the agent keeps its
// peers.
const PeersFile = "peers.json"

// LeaseFile is the file in the state directory in which the agent keeps its lease.
const LeaseFile = "lease.json"

// StoredLease reads the lease the agent stored last. ok is false without one.
func StoredLease(stateDir string) (lease conf.Lease, ok bool, _ error) {
	var stored struct {
		Lease conf.Lease `json:"lease"`
	}
	err := conf.ReadJSON(filepath.Join(stateDir, LeaseFile), &stored)
	if errors.Is(err, fs.ErrNotExist) {
		return lease, false, nil
	}
	return stored.Lease, err == nil, err
}

// StoredPeers reads the peers the agent stored last, within seconds of a change.
// A peer whose VTEP address or subnet another one has by a later lease is left
// out. Without a file there are none.
func StoredPeers(stateDir string) ([]conf.Peer, error) {
	var stored struct {
		Peers []conf.Peer `json:"peers"`
	}
	err := conf.ReadJSON(filepath.Join(stateDir, PeersFile), &stored)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	latest := map[netip.Prefix]uint64{}
	each := func(p conf.Peer, fn func(netip.Prefix)) {
		for _, s := range p.Subnets {
			fn(s)
		}
		for _, a := range p.VTEPs() {
			fn(netip.PrefixFrom(a, a.BitLen()))
		}
	}
	for _, p := range stored.Peers {
		each(p, func(s netip.Prefix) { latest[s] = max(latest[s], p.Epoch) })
	}
	var out []conf.Peer
	for _, p := range stored.Peers {
		superseded := false
		each(p, func(s netip.Prefix) { superseded = superseded || latest[s] > p.Epoch })
		if !superseded {
			out = append(out, p)
		}
	}
	return out, nil
}
