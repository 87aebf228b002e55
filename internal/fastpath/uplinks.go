package fastpath

import (
	"errors"
	"fmt"
	"net/netip"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/rtnl"
)

// maxAsked bounds the look-ups of routes to peers: one for each subnet of
// underlay addresses that peers are in.
const maxAsked = 256

// applyUplinks runs enter_host on the devices that packets of peers arrive at:
// those with the agent IP and those that lead to peers. What arrives elsewhere
// goes the customary way.
func (p *Path) applyUplinks() error {
	links, err := uplinks(p.conn, p.wanted.Local, p.peers.peers)
	if err != nil {
		return err
	}
	var errs []error
	for index, name := range p.uplinks {
		if _, still := links[index]; !still {
			_, err := detach(p.conn, index, atHostEnd)
			if err != nil {
				errs = append(errs, fmt.Errorf("detach the fast path from %s: %w", name, err))
				continue
			}
			delete(p.uplinks, index)
		}
	}
	for index, name := range links {
		if err := p.attach(index, enterFilter, p.objs.EnterHost.FD()); err != nil {
			errs = append(errs, fmt.Errorf("attach the fast path to %s: %w", name, err))
			continue
		}
		p.uplinks[index] = name
	}
	return errors.Join(errs...)
}

// uplink is the index of the device that has the agent IP, 0 if none has: there
// peers arrive that send without VXLAN.
func (p *Path) uplink(local netip.Addr) (index int, err error) {
	addrs, err := p.conn.Addresses(0)
	if err != nil {
		return 0, err
	}
	for _, a := range addrs {
		if a.Prefix.Addr() == local {
			index = a.Index
		}
	}
	return index, nil
}

// uplinks finds the underlay devices, by index. The programs write and strip
// Ethernet, so devices of other kinds are left out.
func uplinks(conn *rtnl.Conn, local netip.Addr, peers map[string]conf.Peer) (map[int]string, error) {
	if !local.IsValid() {
		return nil, nil
	}
	found := map[int]bool{}
	addrs, err := conn.Addresses(0)
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		if a.Prefix.Addr() == local {
			found[a.Index] = true
		}
	}
	asked := map[netip.Prefix]bool{}
	for _, peer := range peers {
		to := peer.AgentIP
		if !to.IsValid() || to == local || to.Is4() != local.Is4() || len(asked) == maxAsked {
			continue
		}
		near, err := to.Prefix(nearBits(to))
		if err != nil || asked[near] {
			continue
		}
		asked[near] = true
		devices, err := conn.Devices(to)
		if err != nil {
			continue // no route; the next look finds it
		}
		for _, index := range devices {
			found[index] = true
		}
	}
	out := map[int]string{}
	for index := range found {
		l, ok, err := conn.LinkByIndex(index)
		if err != nil {
			return nil, err
		}
		if ok && l.Ethernet && l.Kind != "vxlan" {
			out[index] = l.Name
		}
	}
	return out, nil
}

// nearBits is the length of the prefix whose addresses are taken to be behind
// the same devices.
func nearBits(a netip.Addr) int {
	if a.Is4() {
		return 24
	}
	return 64
}
