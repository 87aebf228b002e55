package doctor

import (
	"cmp"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/audit/echo"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

func checkConntrack(h *host) []Finding {
	count, ok := h.sysctlNumber("net/netfilter/nf_conntrack_count")
	limit, ok2 := h.sysctlNumber("net/netfilter/nf_conntrack_max")
	if !ok || !ok2 || limit <= 0 || float64(count) < full*float64(limit) {
		return nil
	}
	return []Finding{{
		Severity: Error, What: "the table of connections is nearly full: new connections of containers are dropped",
		Evidence: fmt.Sprintf("nf_conntrack_count is %d, nf_conntrack_max %d", count, limit),
		Fix:      fmt.Sprintf("echo %d > /proc/sys/net/netfilter/nf_conntrack_max", 2*limit), safe: true,
	}}
}

// checkNeighbourTable: the entries of peers are permanent and do not count,
// those of containers do.
func checkNeighbourTable(h *host) []Finding {
	limit, ok := h.sysctlNumber("net/ipv4/neigh/default/gc_thresh3")
	need := h.ports()
	if !ok || float64(need) < full*float64(limit) {
		return nil
	}
	return []Finding{{
		Severity: Warning, What: "the table of neighbours is too small for the containers of this host: some are not reached",
		Evidence: fmt.Sprintf("%d containers, net.ipv4.neigh.default.gc_thresh3 is %d", need, limit),
		Fix: fmt.Sprintf("echo %[1]d > /proc/sys/net/ipv4/neigh/default/gc_thresh3 && echo %[2]d > /proc/sys/net/ipv4/neigh/default/gc_thresh2",
			4*need, 2*need), safe: true,
	}}
}

// ports is how many containers hang on the bridges of the overlays.
func (h *host) ports() (n int) {
	bridges := map[int]bool{}
	for _, b := range h.bridges() {
		if l, ok := h.links[b.name]; ok {
			bridges[l.Index] = true
		}
	}
	for _, l := range h.links {
		if bridges[l.Master] {
			n++
		}
	}
	return n
}

// checkChecksums: cards that cannot compute the checksum inside of VXLAN send
// wrong ones, and the receiver counts them.
func checkChecksums(h *host) []Finding {
	b, err := os.ReadFile(h.path("proc/self/net/snmp"))
	if err != nil {
		return nil
	}
	wrong, received := counter(string(b), "Tcp", "InCsumErrors")+counter(string(b), "Udp", "InCsumErrors"),
		counter(string(b), "Tcp", "InSegs")+counter(string(b), "Udp", "InDatagrams")
	if wrong < 100 || wrong*1000 < received {
		return nil
	}
	device := "the underlay's card"
	if r, ok, err := h.conn.Path(netip.AddrFrom4([4]byte{1, 1, 1, 1}), 0); err == nil && ok {
		device = h.linkName(r.OIF)
	}
	return []Finding{{
		Severity: Warning, What: "many packets arrive with a wrong checksum: a network card of this host or of another one computes them wrongly inside of VXLAN",
		Evidence: fmt.Sprintf("InCsumErrors %d of %d in /proc/net/snmp", wrong, received),
		Fix:      fmt.Sprintf("on every host: ethtool --offload %s tx off (%s carries the packets)", conf.VTEPName, device),
	}}
}

// counter reads one number of /proc/net/snmp: a line of names and one of values
// for each protocol.
func counter(text, protocol, name string) int {
	var names []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != protocol+":" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		for i := range f {
			if i < len(names) && names[i] == name {
				n, _ := strconv.Atoi(f[i]) // a number the kernel printed
				return n
			}
		}
	}
	return 0
}

const (
	// measured is how many peers are measured; a path is shared by many.
	measured = 64
	patience = 700 * time.Millisecond
)

// checkPathMTU sends every peer a packet as large as a full one of a container, or
// the largest that the peer takes, becomes by the encapsulation, which must not be fragmented, and a small one to
// those that did not answer. Who answers neither is not judged.
func checkPathMTU(h *host) (out []Finding) {
	if len(h.healthy()) == 0 || len(h.peers) == 0 {
		return nil
	}
	var large []echo.Request
	for _, p := range h.peers[:min(len(h.peers), measured)] {
		if h.sharesFamily(p) {
			to := h.addressOf(p)
			device := h.links[h.deviceTo(p)]
			least := min(h.state.MTU, cmp.Or(device.MTU, h.state.MTU), cmp.Or(p.MTUAt(to), h.state.MTU))
			large = append(large, echo.Request{To: to, Size: least + datapath.Overhead(to)})
		}
	}
	answers, err := echo.Send(h.ctx, patience, large)
	if err != nil {
		return []Finding{{Severity: Warning, What: "the MTU of the way to other hosts could not be measured", Evidence: err.Error(), Fix: "run this as root"}}
	}
	var small, lost []echo.Request
	for i, a := range answers {
		if a == echo.Silence {
			lost = append(lost, large[i])
			small = append(small, echo.Request{To: large[i].To})
		}
	}
	if answers, err = echo.Send(h.ctx, patience, small); err != nil {
		return nil // as above
	}
	for i, a := range answers {
		if overhead := datapath.Overhead(small[i].To); a != echo.Silence {
			out = append(out, Finding{
				Severity: Error, What: fmt.Sprintf("the way to host %s does not carry full packets: connections hang when they transfer much", small[i].To),
				Evidence: fmt.Sprintf("it answers small packets and none of %d bytes, which one of %d becomes by the encapsulation", lost[i].Size, lost[i].Size-overhead),
				Object:   small[i].To.String(),
				Fix:      fmt.Sprintf("set vtep_mtu in the cluster configuration to the smallest MTU of the underlay less %d", overhead),
			})
		}
	}
	return out
}
