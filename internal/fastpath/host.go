package fastpath

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/safchain/ethtool"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// Unsuitable says why the host of this thread's namespace had better not use the
// fast path; empty: it may. An error means that it could not be found out.
//
// The programs themselves take what they can on any host. But without offloads
// they gain little, and what others set up for overlay traffic or for the outer
// packets would no longer see them.
func Unsuitable(ctx context.Context, w Wanted) (string, error) {
	conn, err := rtnl.Open()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if w.Local.Is6() {
		return "the underlay is IPv6, where the outer packets have no checksum, which agents of earlier versions refuse", nil
	}
	peers := make(map[string]conf.Peer, len(w.Peers))
	for _, p := range w.Peers {
		peers[p.AgentID] = p
	}
	devices, err := uplinks(conn, w.Local, peers)
	if err != nil {
		return "", err
	}
	if len(devices) == 0 {
		return "no Ethernet device leads to the peers", nil
	}
	var overlays []netip.Prefix
	for _, o := range w.Overlays {
		overlays = append(overlays, o.Subnets...)
	}
	var underlay []string
	if w.Send || w.Take {
		underlay = slices.Sorted(maps.Values(devices))
	}
	for _, look := range []func() (string, error){
		func() (string, error) { return lacksOffloads(devices) },
		encrypted,
		func() (string, error) { return queued(conn) },
		func() (string, error) { return ForeignRule(ctx, overlays, underlay...) },
	} {
		if reason, err := look(); err != nil || reason != "" {
			return reason, err
		}
	}
	return "", nil
}

// offloads are what a device has to do for the programs, each by any of these
// features of ethtool.
var offloads = [][]string{
	{"tx-checksum-ip-generic", "tx-checksum-ipv4"},
	{"tx-tcp-segmentation"},
	{"tx-udp_tnl-segmentation"},
}

// lacksOffloads names a device and what it does not have.
func lacksOffloads(devices map[int]string) (string, error) {
	e, err := ethtool.NewEthtool()
	if err != nil {
		return "", fmt.Errorf("open ethtool's socket: %w", err)
	}
	defer e.Close()
	for _, name := range devices {
		features, err := e.Features(name)
		if err != nil {
			return "", fmt.Errorf("read the features of %s: %w", name, err)
		}
		for _, any := range offloads {
			if !slices.ContainsFunc(any, func(f string) bool { return features[f] }) {
				return fmt.Sprintf("device %s has %s off (ethtool -k %s)", name, any[0], name), nil
			}
		}
	}
	return "", nil
}

// queued names a device of ours in front of which somebody put a queue (tc), as to hold
// all overlays to a rate. The programs come by none of them.
func queued(conn *rtnl.Conn) (string, error) {
	links, err := conn.Links()
	if err != nil {
		return "", err
	}
	for _, l := range links {
		_, half := mark.HalfOf(l.Name)
		if ours := l.Kind == "vxlan" && l.Name == conf.VTEPName || l.Kind == "bridge" && half; ours && shaped(l) {
			return fmt.Sprintf("device %s has the qdisc %s, which packets would pass by (tc qdisc show dev %s)", l.Name, l.Qdisc, l.Name), nil
		}
	}
	return "", nil
}

// xfrmGetPolicy is XFRM_MSG_GETPOLICY of linux/xfrm.h.
const xfrmGetPolicy = 0x15

// encrypted reports policies of IPsec, which the outer packets would pass by.
func encrypted() (string, error) {
	conn, err := rtnl.OpenFamily(unix.NETLINK_XFRM)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer conn.Close()
	policies, err := rtnl.List(conn, rtnl.Request{Step: "list the policies of IPsec", Type: xfrmGetPolicy}, func(rtnl.Message) (bool, bool) { return true, true })
	if err != nil {
		return "", err
	}
	if len(policies) > 0 {
		return "the host has policies of IPsec (ip xfrm policy)", nil
	}
	return "", nil
}
