package antispoof

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
)

// reportOf is what a host says of the groups it listens to (MLDv2, RFC 3810).
func reportOf(groups ...string) []byte {
	b := []byte{listenerReport, 0, 0, 0, 0, 0, 0, byte(len(groups))}
	for _, g := range groups {
		b = append(append(b, 4, 0, 0, 0), addr(g).AsSlice()...)
	}
	hopByHop := []byte{unix.IPPROTO_ICMPV6, 0, 5, 2, 0, 0, 1, 0}
	return ip(allNodesMAC, ownMAC, linkLocalOf(ownMAC), addr("ff02::16"), 0, append(hopByHop, b...))
}

// What a container reports by itself when it comes goes to nobody; what its
// programs ask for does.
func TestReports(t *testing.T) {
	h := newHost(t)
	h.do(func() error { return Protect(ownPort()) })
	const own, second, group = "ff02::1:ff00:2", "ff02::1:ff12:3456", "ff05::1234"
	for _, groups := range [][]string{{own}, {own, second}} {
		if h.passes(reportOf(groups...)) {
			t.Errorf("a report of %s goes to all others", groups)
		}
	}
	for _, groups := range [][]string{{group}, {own, group}, {group, own}, {own, second, group}, {"ff02::1:fe00:2"}, {"ff02::2"}} {
		if !h.passes(reportOf(groups...)) {
			t.Errorf("a report of %s is dropped", groups)
		}
	}
	// One whose first record has a source, so that another group stands where the
	// second record would be looked for.
	sources := bytes.Clone(reportOf(own, own))
	sources[len(sources)-2*20+3] = 1
	if !h.passes(sources) {
		t.Error("a report with sources is dropped")
	}
}
