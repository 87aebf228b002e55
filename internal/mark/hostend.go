package mark

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

// hostEndPrefix starts the alias of every host end.
const hostEndPrefix = "overlay1"

// maxAlias is the kernel's IFALIASZ less the terminating zero.
const maxAlias = 255

// sameNetwork stands in an alias for a network called like its overlay.
const sameNetwork = "="

// hashMark starts a name that stands for one too long for an alias. No network
// and no container can have a name that starts so.
const hashMark = "~"

// HostEnd is the device name of a host end, the end of a container's veth pair
// that stays on the host: v, m or d for the half, and twelve hex digits of the
// attachment's key. It is the same for the same attachment, so that DEL finds
// the link when nothing but the attachment is known.
func HostEnd(half conf.Half, key conf.Key) string {
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

// ShortNames are what an alias may say of an attachment where its names do not fit. A
// store that was rebuilt from the alias has it under one of them.
func ShortNames(a conf.Attachment) []conf.Attachment {
	short := conf.Attachment{Network: a.Network, ContainerID: ShortID(a.Key()), IfName: a.IfName}
	shorter := short
	shorter.Network = hashOf(a.Network)
	return []conf.Attachment{short, shorter}
}

func parseKey(text string) (conf.Key, error) {
	b, err := hex.DecodeString(text)
	if err != nil || len(b) != len(conf.Key{}) {
		return conf.Key{}, fmt.Errorf("key %q: want %d hex digits", text, 2*len(conf.Key{}))
	}
	return conf.Key(b), nil
}

// Alias is what the alias of a host end says: whose it is and which addresses
// are behind it. The address store is rebuilt from it, and links without one are
// left alone.
type Alias struct {
	Overlay string
	Half    conf.Half
	Addrs   []netip.Addr
	// MAC is that of the container's end, which may send from it and from Addrs
	// only; zero: from whatever it likes.
	MAC   conf.MAC
	Since time.Duration // CLOCK_BOOTTIME of the ADD, whole seconds
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
// MAC is written as the link-local address that follows from it, after the other
// addresses. A network called like its overlay is written "=". A container id that does
// not fit is written as the attachment's key, a network that does not fit even
// then as a hash.
func (a Alias) String() string {
	var addrs []string
	for _, ip := range a.Addrs {
		addrs = append(addrs, ip.String())
	}
	if a.MAC != (conf.MAC{}) {
		addrs = append(addrs, LinkLocal(a.MAC).String())
	}
	head := strings.Join([]string{hostEndPrefix, a.Overlay, string(a.Half), strings.Join(addrs, ","),
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
// is no host end of ours.
func ParseAlias(s string) (a Alias, ok bool) {
	f := strings.Split(s, " ")
	if len(f) != 8 || f[0] != hostEndPrefix || conf.CheckName(f[1]) != nil {
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
		if ip.Is6() && ip.IsLinkLocalUnicast() {
			a.MAC = macOfLinkLocal(ip)
			continue
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

// IsHostEnd reports whether a link of this name and alias is a host end: the
// alias is one of ours, and the name is the one that follows from it.
func IsHostEnd(name, alias string) (Alias, bool) {
	a, ok := ParseAlias(alias)
	return a, ok && name == HostEnd(a.Half, a.Key())
}

// LooksLikeHostEnd reports whether a name has the form of a host end's.
func LooksLikeHostEnd(name string) bool {
	if len(name) != len("vm0123456789ab") || name[0] != 'v' || name[1] != 'm' && name[1] != 'd' {
		return false
	}
	return strings.Trim(name[2:], "0123456789abcdef") == ""
}

// MayBeHostEnd is LooksLikeHostEnd of a name or, with more, of one that begins so.
func MayBeHostEnd(name string, more bool) bool {
	const form = "vm0123456789ab"
	if more && len(name) < len(form) {
		name += form[len(name):]
	}
	return LooksLikeHostEnd(name)
}

// HostEndMAC is the MAC of a host end: locally administered, and the same for
// the same attachment.
func HostEndMAC(key conf.Key) conf.MAC {
	return conf.MAC{0x0e, key[1], key[2], key[3], key[4], key[5]}
}

// ContainerMAC is the MAC of a container's interface. It follows from the first
// IPv4 address, so that neighbours which remember the last owner of the address
// remember the right MAC. addrs must not be empty.
func ContainerMAC(addrs []netip.Prefix) conf.MAC {
	for _, p := range addrs {
		if p.Addr().Is4() {
			return macOfIPv4(p.Addr())
		}
	}
	sum := sha256.Sum256(addrs[0].Addr().AsSlice())
	return conf.MAC{sum[0]&^1 | 2, sum[1], sum[2], sum[3], sum[4], sum[5]}
}

// LinkLocal is the address that IPv6 derives from a MAC (modified EUI-64).
func LinkLocal(m conf.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

func macOfLinkLocal(a netip.Addr) conf.MAC {
	b := a.As16()
	return conf.MAC{b[8] ^ 2, b[9], b[10], b[13], b[14], b[15]}
}
