package fastpath

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"overlayd.internal/overlay/conf"
)

// peerTable keeps the maps of the peers: where an agent subnet is, and who may
// send.
type peerTable struct {
	subnets4, subnets6, senders *ebpf.Map

	// What the maps have. An entry that could not be written has the zero value,
	// so that it is written again and can still be removed.
	have    map[netip.Prefix]programsPeer
	allowed map[netip.Addr]bool // false: could not be written

	peers    map[string]conf.Peer // as last set, by agent id
	disputed bool                 // two of them claim one subnet
	send     bool                 // those that take it are sent to without VXLAN
}

func newPeerTable(subnets4, subnets6, senders *ebpf.Map) peerTable {
	return peerTable{
		subnets4: subnets4, subnets6: subnets6, senders: senders,
		have: map[netip.Prefix]programsPeer{}, allowed: map[netip.Addr]bool{}, peers: map[string]conf.Peer{},
	}
}

// set makes peers the only ones. What is new comes before what goes, so that a
// subnet that moves from one peer to another always has an entry.
func (t *peerTable) set(peers []conf.Peer, local netip.Addr) error {
	clear(t.peers)
	for i := range peers {
		t.peers[peers[i].AgentID] = peers[i]
	}
	want, senders, disputed := t.expand(peers, local)
	t.disputed = disputed
	errs := []error{t.putSenders(senders), t.putSubnets(want)}
	for s := range t.have {
		if _, keep := want[s]; !keep {
			errs = append(errs, t.deleteSubnet(s))
		}
	}
	for a := range t.allowed {
		if _, keep := senders[a]; !keep {
			errs = append(errs, t.deleteSender(a))
		}
	}
	return peersError(errs)
}

// change puts peers that are new or another and takes those with the ids in gone
// away. It costs what changed, unless a subnet is claimed by two.
func (t *peerTable) change(set []conf.Peer, gone []string, local netip.Addr) error {
	var old []conf.Peer
	for i := range set {
		if was, ok := t.peers[set[i].AgentID]; ok {
			old = append(old, was)
		}
		t.peers[set[i].AgentID] = set[i]
	}
	for _, id := range gone {
		if was, ok := t.peers[id]; ok {
			old = append(old, was)
			delete(t.peers, id)
		}
	}
	had, from, _ := t.expand(old, local)
	want, senders, disputed := t.expand(set, local)
	disputed = disputed || t.disputed
	for s := range want {
		_, taken := t.have[s]
		_, ours := had[s]
		disputed = disputed || taken && !ours
	}
	for s, e := range had {
		disputed = disputed || t.have[s] != e
	}
	if disputed {
		return t.set(slices.Collect(maps.Values(t.peers)), local)
	}
	errs := []error{t.putSenders(senders), t.putSubnets(want)}
	for s := range had {
		if _, keep := want[s]; !keep {
			errs = append(errs, t.deleteSubnet(s))
		}
	}
	for a := range from {
		if _, keep := senders[a]; !keep && !t.at(a) {
			errs = append(errs, t.deleteSender(a))
		}
	}
	return peersError(errs)
}

// at says whether a peer has the agent IP.
func (t *peerTable) at(a netip.Addr) bool {
	for _, p := range t.peers {
		if p.AgentIP == a {
			return true
		}
	}
	return false
}

func peersError(errs []error) error {
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("tell the fast path its peers: %w", err)
	}
	return nil
}

// expand turns peers into entries. Where two claim one subnet, the newer lease
// has it.
func (t *peerTable) expand(peers []conf.Peer, local netip.Addr) (subnets map[netip.Prefix]programsPeer, senders map[netip.Addr]struct{}, disputed bool) {
	subnets = make(map[netip.Prefix]programsPeer, 2*len(peers))
	senders = make(map[netip.Addr]struct{}, len(peers))
	disputed = t.addPeers(subnets, senders, peers, local)
	if disputed {
		peers = slices.Clone(peers)
		slices.SortStableFunc(peers, func(a, b conf.Peer) int { return cmp.Compare(a.Epoch, b.Epoch) })
		t.addPeers(subnets, senders, peers, local)
	}
	return subnets, senders, disputed
}

// addPeers lets a later peer win over an earlier one, and says whether one had
// to.
func (t *peerTable) addPeers(subnets map[netip.Prefix]programsPeer, senders map[netip.Addr]struct{}, peers []conf.Peer, local netip.Addr) (disputed bool) {
	for i := range peers {
		p := &peers[i]
		// A peer at our own agent IP is this host under an agent id it once had.
		if !p.AgentIP.IsValid() || p.AgentIP == local || p.AgentIP.Is4() != local.Is4() {
			continue
		}
		senders[p.AgentIP] = struct{}{}
		e := programsPeer{Addr: words(p.AgentIP), VtepMac: p.VTEPMAC, Mtu: uint16(p.MTU)}
		if t.send && p.Direct {
			e.Direct = 1
		}
		for _, s := range p.Subnets {
			s = s.Masked()
			if old, ok := subnets[s]; ok && old != e {
				disputed = true
			}
			subnets[s] = e
		}
	}
	return disputed
}

func (t *peerTable) putSenders(want map[netip.Addr]struct{}) error {
	var keys [][4]uint32
	for a := range want {
		if !t.allowed[a] {
			keys = append(keys, words(a))
			t.allowed[a] = true
		}
	}
	err := update(t.senders, keys, make([]uint32, len(keys)))
	if err != nil {
		for a := range want {
			t.allowed[a] = false
		}
	}
	return err
}

func (t *peerTable) putSubnets(want map[netip.Prefix]programsPeer) error {
	var keys4 []programsPrefix4
	var keys6 []programsPrefix6
	var values4, values6 []programsPeer
	for s, e := range want {
		if t.have[s] == e {
			continue
		}
		t.have[s] = e
		if s.Addr().Is4() {
			keys4, values4 = append(keys4, prefix4(s)), append(values4, e)
		} else {
			keys6, values6 = append(keys6, prefix6(s)), append(values6, e)
		}
	}
	err := errors.Join(update(t.subnets4, keys4, values4), update(t.subnets6, keys6, values6))
	if err != nil {
		for s := range want {
			t.have[s] = programsPeer{}
		}
	}
	return err
}

func (t *peerTable) deleteSubnet(s netip.Prefix) (err error) {
	if s.Addr().Is4() {
		err = t.subnets4.Delete(prefix4(s))
	} else {
		err = t.subnets6.Delete(prefix6(s))
	}
	if err != nil && !isMissing(err) {
		return err
	}
	delete(t.have, s)
	return nil
}

func (t *peerTable) deleteSender(a netip.Addr) error {
	if err := t.senders.Delete(words(a)); err != nil && !isMissing(err) {
		return err
	}
	delete(t.allowed, a)
	return nil
}

func prefix4(s netip.Prefix) programsPrefix4 {
	return programsPrefix4{Bits: uint32(s.Bits()), Addr: words(s.Addr())[0]}
}

func prefix6(s netip.Prefix) programsPrefix6 {
	return programsPrefix6{Bits: uint32(s.Bits()), Addr: words(s.Addr())}
}

// update puts many entries with one call where the kernel can.
func update[K, V any](m *ebpf.Map, keys []K, values []V) error {
	if len(keys) == 0 {
		return nil
	}
	_, err := m.BatchUpdate(keys, values, nil)
	if !errors.Is(err, ebpf.ErrNotSupported) {
		return err
	}
	for i := range keys {
		if err := m.Put(keys[i], values[i]); err != nil {
			return err
		}
	}
	return nil
}

// isMissing says that a map has no such entry.
func isMissing(err error) bool { return errors.Is(err, ebpf.ErrKeyNotExist) }
