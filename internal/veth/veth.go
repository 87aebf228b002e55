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
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
)

// Mark starts the alias of every link of ours.
const Mark = "overlay1"

// maxAlias is the kernel's IFALIASZ less the terminating zero.
const maxAlias = 255

// sameNetwork stands in an alias for a network called like its overlay.
const sameNetwork = "="

// hashMark starts a name that stands for one too long for an alias. No network
// and no container can have a name that starts so.
const hashMark = "~"

// Name is the host end's device name: v, m or d for the half, and twelve hex
// digits of the attachment's key. It is the same for the same attachment.
func Name(half conf.Half, key conf.Key) string {
	return "v" + string(half[0]) + hex.EncodeToString(key[:6])
}

// KeyOf is the key of an attachment that was read from an alias: the
// attachment's own, also where the alias could not hold its names.
func KeyOf(a conf.Attachment) conf.Key {
	if text, ok := strings.CutPrefix(a.ContainerID, hashMark); ok {
		if key, err := parseKey(text); err == nil {
			return key
		}
	}
	return a.Key()
}

// ShortID stands in an alias for a container id that does not fit.
func ShortID(key conf.Key) string { return hashMark + key.String() }

func parseKey(text string) (conf.Key, error) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != len(conf.Key{}) {
		return conf.Key{}, fmt.Errorf("key %q: want %d hex digits", text, 2*len(conf.Key{}))
	}
	return conf.Key(b), nil
}

// Alias is what the alias of a host end says.
type Alias struct {
	Overlay string
	Half    conf.Half
	Addrs   []netip.Addr
	Since   time.Duration // CLOCK_BOOTTIME of the ADD, whole seconds
	// Attachment has its real names where they fit, which all but very long ones
	// do. Else ContainerID stands for the attachment (see KeyOf), and Network
	// may stand for the network's name (see InNetwork).
	Attachment conf.Attachment
}

// Key is the key of the attachment.
func (a Alias) Key() conf.Key { return KeyOf(a.Attachment) }

// InNetwork reports whether the attachment belongs to the network.
func (a Alias) InNetwork(network string) bool {
	return a.Attachment.Network == network || a.Attachment.Network == hashOf(network)
}

// NewAlias describes an attachment.
func NewAlias(overlay string, half conf.Half, a conf.Attachment, addrs []netip.Addr, since time.Duration) Alias {
	return Alias{Overlay: overlay, Half: half, Addrs: addrs, Since: since.Truncate(time.Second), Attachment: a}
}

// String is the text the kernel stores:
//
//	overlay1 <overlay> <half> <addr>[,<addr>] <seconds> <ifname> <network> <container id>
//
// A network called like its overlay is written "=". A container id that does
// not fit is written as the attachment's key, a network that does not fit even
// then as a hash.
func (a Alias) String() string {
	var addrs []string
	for _, ip := range a.Addrs {
		addrs = append(addrs, ip.String())
	}
	head := strings.Join([]string{Mark, a.Overlay, string(a.Half), strings.Join(addrs, ","),
		strconv.FormatInt(int64(a.Since/time.Second), 10), a.Attachment.IfName}, " ")
	network, key := a.Attachment.Network, ShortID(a.Key())
	if network == a.Overlay {
		network = sameNetwork
	}
	for _, tail := range []string{network + " " + a.Attachment.ContainerID, network + " " + key} {
		if len(head)+1+len(tail) <= maxAlias {
			return head + " " + tail
		}
	}
	return head + " " + hashOf(a.Attachment.Network) + " " + key
}

func hashOf(network string) string {
	h := sha256.Sum256([]byte(network))
	return hashMark + hex.EncodeToString(h[:8])
}

// ParseAlias reads what String wrote. ok is false for the alias of a link that
// is not ours.
func ParseAlias(s string) (a Alias, ok bool) {
	f := strings.Split(s, " ")
	if len(f) != 8 || f[0] != Mark || conf.CheckName(f[1]) != nil {
		return Alias{}, false
	}
	half, err := conf.ParseHalf(f[2])
	if err != nil {
		return Alias{}, false
	}
	a = Alias{Overlay: f[1], Half: half, Attachment: conf.Attachment{Network: f[6], ContainerID: f[7], IfName: f[5]}}
	for _, text := range strings.Split(f[3], ",") {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			return Alias{}, false
		}
		a.Addrs = append(a.Addrs, ip)
	}
	seconds, err := strconv.ParseInt(f[4], 10, 64)
	if err != nil {
		return Alias{}, false
	}
	a.Since = time.Duration(seconds) * time.Second
	if a.Attachment.Network == sameNetwork {
		a.Attachment.Network = a.Overlay
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
