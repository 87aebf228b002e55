// Package veth is how the host side of a container's interface is recognised:
// its name follows from the attachment, and its alias (ip link show: "alias")
// says whose it is and which addresses are behind it.
//
// The name lets DEL find the link when nothing but the attachment is known. The
// alias lets the address store be rebuilt from the kernel, and keeps us from
// touching a link that is not ours.
package veth

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// Mark starts the alias of every link of ours.
const Mark = "overlay1"

// maxAlias is the kernel's IFALIASZ less the terminating zero.
const maxAlias = 255

// Fields of an alias that stand for something that did not fit.
const (
	absent      = "-" // of a container id
	sameNetwork = "=" // the network is called like the overlay
	hashMark    = "~" // a network name too long, as a hash
)

// Name is the host end's device name: v, m or d for the half, and twelve hex
// digits of the attachment's key. It is the same for the same attachment.
func Name(half conf.Half, key ipam.Key) string {
	return "v" + string(half[0]) + hex.EncodeToString(key[:6])
}

// Alias is what the alias of a host end says.
type Alias struct {
	Overlay string
	Half    conf.Half
	Key     ipam.Key // of the attachment
	Addrs   []netip.Addr
	Since   time.Duration // CLOCK_BOOTTIME of the ADD, whole seconds
	// Attachment is complete unless network and container id together are very
	// long: then ContainerID is empty, and Network may be (see InNetwork).
	Attachment ipam.Attachment

	networkHash string
}

// InNetwork reports whether the attachment belongs to the network.
func (a Alias) InNetwork(network string) bool {
	if a.networkHash != "" {
		return a.networkHash == hashOf(network)
	}
	return a.Attachment.Network == network
}

// NewAlias describes an attachment.
func NewAlias(overlay string, half conf.Half, a ipam.Attachment, addrs []netip.Addr, since time.Duration) Alias {
	return Alias{Overlay: overlay, Half: half, Key: a.Key(), Addrs: addrs, Since: since.Truncate(time.Second), Attachment: a}
}

// String is the text the kernel stores:
//
//	overlay1 <overlay> <half> <key> <addr>[,<addr>] <seconds> <ifname> <network> <container id>
//
// A network called like its overlay is written "=". A container id that does
// not fit is written "-"; a network that does not fit even then is hashed.
func (a Alias) String() string {
	var addrs []string
	for _, ip := range a.Addrs {
		addrs = append(addrs, ip.String())
	}
	network := a.Attachment.Network
	if network == a.Overlay {
		network = sameNetwork
	}
	head := strings.Join([]string{Mark, a.Overlay, string(a.Half), a.Key.String(), strings.Join(addrs, ","),
		strconv.FormatInt(int64(a.Since/time.Second), 10), a.Attachment.IfName}, " ")
	for _, tail := range []string{
		" " + network + " " + a.Attachment.ContainerID,
		" " + network + " " + absent,
	} {
		if len(head)+len(tail) <= maxAlias {
			return head + tail
		}
	}
	return head + " " + hashOf(a.Attachment.Network) + " " + absent
}

func hashOf(network string) string {
	h := sha256.Sum256([]byte(network))
	return hashMark + hex.EncodeToString(h[:8])
}

// ParseAlias reads what String wrote. ok is false for the alias of a link that
// is not ours.
func ParseAlias(s string) (a Alias, ok bool) {
	f := strings.Split(s, " ")
	if len(f) != 9 || f[0] != Mark || conf.CheckName(f[1]) != nil {
		return Alias{}, false
	}
	key, err := hex.DecodeString(f[3])
	if err != nil || len(key) != len(ipam.Key{}) {
		return Alias{}, false
	}
	half, err := conf.ParseHalf(f[2])
	if err != nil {
		return Alias{}, false
	}
	a = Alias{Overlay: f[1], Half: half, Key: ipam.Key(key)}
	for _, text := range strings.Split(f[4], ",") {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			return Alias{}, false
		}
		a.Addrs = append(a.Addrs, ip)
	}
	seconds, err := strconv.ParseInt(f[5], 10, 64)
	if err != nil {
		return Alias{}, false
	}
	a.Since = time.Duration(seconds) * time.Second
	a.Attachment.IfName = f[6]
	switch network := f[7]; {
	case network == sameNetwork:
		a.Attachment.Network = a.Overlay
	case strings.HasPrefix(network, hashMark):
		a.networkHash = network
	default:
		a.Attachment.Network = network
	}
	if f[8] != absent {
		a.Attachment.ContainerID = f[8]
	}
	return a, true
}

// Link is a host end of ours.
type Link struct {
	Index  int
	Name   string
	Master int // index of the bridge; 0 when it has none
	Alias
}
