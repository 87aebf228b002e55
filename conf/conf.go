// Package conf is the vocabulary every program of the overlay shares: the
// cluster configuration, leases and peers, the document an agent publishes,
// and the configuration a CNI runtime passes to our plugins.
//
// It only describes, checks and encodes. It opens no socket, touches no kernel
// object and imports nothing else of this module, so that the CNI programs can
// link it for next to nothing. The one side effect it has is writing a file
// atomically (WriteFile). YAML is read by conf/clusterfile, which the CNI
// programs do not link.
package conf

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// The datapath numbers of DC/OS, kept so that both can share a firewall rule.
const (
	VNI       = 1024       // VXLAN network identifier of every overlay
	VTEPName  = "vtep1024" // the VXLAN device of a host
	VXLANPort = 64000      // UDP port of the outer packets
)

// Defaults that several programs have to agree on.
const (
	DefaultRunDir   = "/run/overlay"     // published state and address stores; on tmpfs
	DefaultStateDir = "/var/lib/overlay" // what survives a reboot
	StateFile       = "state.json"       // in the run directory: the published document
	SocketFile      = "overlayd.sock"    // in the run directory: the agent's HTTP socket
	CAFile          = "ca.pem"           // in the run directory: the CAs of the cluster, for programs that ask the coordinator
	AttachmentsFile = "attachments.lock" // in the run directory: what CNI programs lock, without content
	IPAMDir         = "ipam"             // in the run directory: one address store per overlay

	// DefaultCoolingSeconds is how long a released address rests before it is
	// used again. Conntrack remembers unanswered and closing connections for
	// 120 s, so anything shorter lets a packet of the old owner reach the new.
	DefaultCoolingSeconds = 150
)

// MaxNameLen is the longest overlay name in bytes: a device name has 15, of
// which "m-" or "d-" takes two.
const MaxNameLen = 13

// reservedNames are the names Docker keeps for itself.
var reservedNames = []string{"host", "bridge", "default", "none"}

// plainName reports whether s is [A-Za-z0-9][A-Za-z0-9_.-]*. It is a loop and no
// regular expression because compiling one would be a tenth of the start of a
// CNI program.
func plainName(s string) bool {
	for i, c := range []byte(s) {
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '_' && c != '.' && c != '-') {
			return false
		}
	}
	return s != ""
}

// CheckName says what is wrong with an overlay name, or nil. Names are 1 to 13
// bytes of [A-Za-z0-9][A-Za-z0-9_.-]* and not one of Docker's own.
func CheckName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("missing; give the overlay a name of 1 to %d characters", MaxNameLen)
	case len(name) > MaxNameLen:
		return fmt.Errorf("%q has %d bytes, at most %d fit (the bridge is called m-%s and a device name holds 15)",
			name, len(name), MaxNameLen, name)
	case !plainName(name):
		return fmt.Errorf("%q has a character that is not allowed; use letters, digits, '_', '.' and '-', starting with a letter or digit", name)
	case slices.Contains(reservedNames, name):
		return fmt.Errorf("%q is reserved by Docker; the reserved names are %s", name, strings.Join(reservedNames, ", "))
	}
	return nil
}

// Half is one half of an agent subnet. The lower half belongs to Mesos, the
// upper one to Docker and its kin.
type Half string

// The two halves of every agent subnet.
const (
	Mesos  Half = "mesos"
	Docker Half = "docker"
)

// Halves lists both, in address order.
var Halves = [...]Half{Mesos, Docker}

// ParseHalf turns "mesos" or "docker" into a Half.
func ParseHalf(s string) (Half, error) {
	if h := Half(s); h == Mesos || h == Docker {
		return h, nil
	}
	return "", fmt.Errorf("half %q: must be %q or %q", s, Mesos, Docker)
}

// Bridge is the name of the half's bridge: m-<overlay> or d-<overlay>.
func (h Half) Bridge(overlay string) string {
	if h == Mesos {
		return "m-" + overlay
	}
	return "d-" + overlay
}

// Of returns this half of an agent subnet, or the zero Prefix when the subnet
// is not valid (the overlay lacks that family).
func (h Half) Of(agentSubnet netip.Prefix) netip.Prefix {
	if !agentSubnet.IsValid() || agentSubnet.Bits() >= agentSubnet.Addr().BitLen() {
		return netip.Prefix{}
	}
	agentSubnet = agentSubnet.Masked()
	bits := agentSubnet.Bits()
	addr := agentSubnet.Addr()
	if h == Docker {
		b := addr.AsSlice()
		b[bits/8] |= 0x80 >> (bits % 8)
		addr, _ = netip.AddrFromSlice(b)
	}
	return netip.PrefixFrom(addr, bits+1)
}

// Gateway is the first host address of a half; the host itself has it, on the
// bridge.
func Gateway(half netip.Prefix) netip.Addr { return half.Masked().Addr().Next() }

// GatewayPrefix is Gateway with the half's prefix length.
func GatewayPrefix(half netip.Prefix) netip.Prefix {
	return netip.PrefixFrom(Gateway(half), half.Bits())
}

// FirstContainer and LastContainer bound the addresses of a half that
// containers can get, both inclusive. The network address, the gateway and, in
// IPv4, the broadcast address are not among them.
func FirstContainer(half netip.Prefix) netip.Addr { return Gateway(half).Next() }

// LastContainer is described with FirstContainer.
func LastContainer(half netip.Prefix) netip.Addr {
	last := LastAddr(half)
	if last.Is4() {
		return last.Prev()
	}
	return last
}

// LastAddr is the highest address of a prefix.
func LastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Containers is the number of addresses for containers in a half of this length:
// 2^n - 3 in IPv4 and 2^n - 2 in IPv6, capped at 2^62. How many containers it can
// hold is Capacity.
func Containers(half netip.Prefix) uint64 {
	host := half.Addr().BitLen() - half.Bits()
	if host > 62 {
		host = 62
	}
	n, taken := uint64(1)<<host, uint64(2)
	if half.Addr().Is4() {
		taken = 3
	}
	if n <= taken {
		return 0
	}
	return n - taken
}

// BridgePorts is how many ports a Linux bridge can have (BR_MAX_PORTS of the
// kernel, less the one that is never given out).
const BridgePorts = 1023

// Capacity is how many containers a half can hold: it has so many addresses, and
// its bridge no more ports.
func Capacity(half netip.Prefix) uint64 { return min(Containers(half), BridgePorts) }

// MAC is an Ethernet address. Its text form is lower case with colons.
type MAC [6]byte

// ParseMAC reads aa:bb:cc:dd:ee:ff in either case.
func ParseMAC(s string) (MAC, error) {
	var m MAC
	if len(s) != 17 {
		return m, fmt.Errorf("MAC address %q: want six bytes in hex, as in 70:b3:d5:80:00:01", s)
	}
	for i := range m {
		if i < 5 && s[i*3+2] != ':' {
			return MAC{}, fmt.Errorf("MAC address %q: want colons between the bytes", s)
		}
		hi, ok1 := hexDigit(s[i*3])
		lo, ok2 := hexDigit(s[i*3+1])
		if !ok1 || !ok2 {
			return MAC{}, fmt.Errorf("MAC address %q: %q is not a hex byte", s, s[i*3:i*3+2])
		}
		m[i] = hi<<4 | lo
	}
	return m, nil
}

func hexDigit(c byte) (byte, bool) {
	switch {
	case c >= '0' && c <= '9':
		return c - '0', true
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10, true
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}

// localMAC is the bit of locally administered MACs.
const localMAC = 0x02

// VTEPMAC derives a VTEP's MAC: the first three bytes of the OUI, then the last
// three of the VTEP's address. One that is made of an IPv6 address has the bit of
// locally administered addresses the other way round, so that it is never one that
// is made of an IPv4 address (ADR 0060).
func VTEPMAC(oui MAC, vtep netip.Addr) MAC {
	if vtep.Is6() {
		oui[0] ^= localMAC
	}
	ip := vtep.As16()
	return MAC{oui[0], oui[1], oui[2], ip[13], ip[14], ip[15]}
}

func (m MAC) String() string { return string(m.Append(nil)) }

// Append appends what String returns.
func (m MAC) Append(to []byte) []byte {
	const digits = "0123456789abcdef"
	for i, b := range m {
		if i > 0 {
			to = append(to, ':')
		}
		to = append(to, digits[b>>4], digits[b&15])
	}
	return to
}

// MarshalText makes a MAC a JSON string.
func (m MAC) MarshalText() ([]byte, error) { return m.Append(nil), nil }

// UnmarshalText reads what MarshalText wrote.
func (m *MAC) UnmarshalText(b []byte) (err error) {
	*m, err = ParseMAC(string(b))
	return err
}
