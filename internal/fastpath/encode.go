package fastpath

import (
	"encoding/binary"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// words is an address as the programs hold it: in network byte order, an IPv4
// address in the first word.
func words(a netip.Addr) (w [4]uint32) {
	if a.Is4() {
		b := a.As4()
		w[0] = binary.NativeEndian.Uint32(b[:])
		return w
	}
	if !a.IsValid() {
		return w
	}
	b := a.As16()
	for i := range w {
		w[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return w
}

// mask has the first bits of an address of length bytes set.
func mask(bits, length int) netip.Addr {
	b := make([]byte, length)
	for i := range bits {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func encodeOverlay(o Overlay) programsOverlay {
	// Nothing lies in these: an address and all ones is never the net.
	e := programsOverlay{Net4: 1, Net6: [4]uint32{1}, Taken: 1}
	for _, s := range o.Subnets {
		s = s.Masked()
		if s.Addr().Is4() {
			e.Net4, e.Mask4 = words(s.Addr())[0], words(mask(s.Bits(), 4))[0]
		} else {
			e.Net6, e.Mask6 = words(s.Addr()), words(mask(s.Bits(), 16))
		}
	}
	return e
}

// defaultTTL is what the kernel's tunnels put into the outer header when they
// are told nothing.
const defaultTTL = 64

// The kernel's own range of local ports.
const lowPort, highPort = 32768, 60999

// localPorts is the range from which the kernel takes the source ports of
// tunnels, in the namespace of this thread.
func localPorts() (low, high uint16) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return lowPort, highPort
	}
	f := strings.Fields(string(b))
	if len(f) != 2 {
		return lowPort, highPort
	}
	l, errLow := strconv.ParseUint(f[0], 10, 16)
	h, errHigh := strconv.ParseUint(f[1], 10, 16)
	if errLow != nil || errHigh != nil || l >= h {
		return lowPort, highPort
	}
	return uint16(l), uint16(h)
}
