package explain

import (
	"net/netip"
	"slices"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/audit/doctor"
)

// What comes from a host is judged by the VXLAN device that it comes by, and by no
// other.
func TestAdmission(t *testing.T) {
	conn, err := rtnl.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	lease := conf.Lease{Bridges: conf.Halves[:], Grants: []conf.Grant{{
		Overlay: conf.Overlay{Name: "dcos", Subnet: p("9.0.0.0/8"), Prefix: 24}, Subnet: p("9.0.1.0/24"),
	}}}
	// The second agent IP is one that every host has.
	state := conf.State{IP: a("fd00::1"), SecondIP: a("127.0.0.1"), Overlays: lease.AgentOverlays(nil)}
	two := conf.Underlay{TwoFamilies: true}
	for peer, comesBy := range map[*conf.Peer]string{
		nil: conf.VTEPName, {AgentIP: a("fd00::2"), Underlay: two}: conf.VTEPName, {AgentIP: a("127.0.0.2"), Underlay: two}: mark.SecondVTEP,
	} {
		for _, device := range []string{conf.VTEPName, mark.SecondVTEP, "m-dcos", "d-dcos", ""} {
			w := &walk{
				ctx: t.Context(), conn: conn, books: audit.Host{State: state},
				findings: []doctor.Finding{{Check: "forwarding", Severity: doctor.Error, Object: device}},
				a:        end{addr: a("9.0.2.130"), overlay: &state.Overlays[0], peer: peer},
				b:        end{addr: a("9.0.1.130"), overlay: &state.Overlays[0], record: &ipam.Record{Half: conf.Docker}},
			}
			want := !slices.Contains([]string{comesBy, "d-dcos", ""}, device)
			if got := w.admission(); got != want {
				t.Errorf("from %+v, with a finding about %q: passes %v, want %v", peer, device, got, want)
			}
		}
	}
}
