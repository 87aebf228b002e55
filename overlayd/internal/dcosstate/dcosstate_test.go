package dcosstate_test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/overlayd/internal/dcosstate"
)

// The answer of the cluster in DC/OS's documentation.
func TestParseSample(t *testing.T) {
	data, err := os.ReadFile("../../../integration/testdata/seed-state.json")
	if err != nil {
		t.Fatal(err)
	}
	agents, skipped, problems := dcosstate.Parse(data)
	if len(problems) > 0 || len(skipped) > 0 {
		t.Fatalf("problems %v, skipped %v", problems, skipped)
	}
	var got []string
	for _, a := range agents {
		line := fmt.Sprint(a.Path, " ", a.IP, " ", a.VTEP, " ", a.VTEP6, " ", a.MAC)
		for _, s := range a.Subnets {
			line += fmt.Sprint(" ", s.Overlay, " ", s.Subnet, " ", s.Subnet6)
		}
		got = append(got, line)
	}
	want := []string{
		"agents[0] 172.17.0.2 44.128.0.1 fd01:a::1 70:b3:d5:80:00:01 dcos 9.0.0.0/24 invalid Prefix dcos6 invalid Prefix fd01:b::/80",
		"agents[1] 172.17.0.4 44.128.0.2 fd01:a::2 70:b3:d5:80:00:02 dcos 9.0.1.0/24 invalid Prefix dcos6 invalid Prefix fd01:b:0:0:1::/80",
		"agents[2] 172.17.0.3 44.128.0.3 fd01:a::3 70:b3:d5:80:00:03 dcos 9.0.2.0/24 invalid Prefix dcos6 invalid Prefix fd01:b:0:0:2::/80",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// Whatever cannot be read is reported with its place, all of it at once.
func TestParseProblems(t *testing.T) {
	for _, tt := range []struct {
		name, document string
		want           []string
	}{
		{"no JSON", "{\n\"agents\": [\n", []string{"line 3: unexpected end of JSON input"}},
		{"other JSON", "[]", []string{"line 1:"}},
		{"a wrong kind", "{\n\"agents\": [{\"ip\": 5}]}", []string{"line 2: agents.ip is a JSON number"}},
		{"no agents", `{"network": {}}`, []string{"agents: missing or empty"}},
		{"many at once", `{"agents": [
			{"ip": "172.17.0", "overlays": [
				{"backend": {"vxlan": {"vni": 5, "vtep_ip": "44.128.0.1/20", "vtep_mac": "70:b3"}}, "info": {"name": "dcos"}, "subnet": "9.0.0.0"},
				{"backend": {"vxlan": {"vni": 5, "vtep_ip": "44.128.0.2/20", "vtep_mac": "70:b3"}}, "info": {"name": "dcos"}, "subnet": "9.0.1.0/24"},
				{"backend": {"vxlan": {"vni": 5, "vtep_ip": "44.128.0.1/20", "vtep_mac": "70:b3"}}, "info": {"name": "six"}, "subnet6": "9.0.1.0/24"}]},
			{"overlays": [{"info": {"name": "dcos"}, "backend": {"vxlan": {"vtep_ip": "fd01::1", "vtep_ip6": "44.128.0.9/20"}}}]}]}`,
			[]string{
				`agents[0].ip: "172.17.0" is no IP address`,
				"agents[0].overlays[0].backend.vxlan.vtep_mac: ",
				"agents[0].overlays[0].backend.vxlan.vni: 5; ",
				`agents[0].overlays[0].subnet: "9.0.0.0" is no subnet`,
				"agents[0].overlays[1].backend.vxlan: differs from agents[0].overlays[0].backend.vxlan",
				`agents[0].overlays[1].info.name: overlay "dcos" stands at agents[0].overlays[0] too`,
				"agents[0].overlays[2].subnet6: 9.0.1.0/24 is a subnet of the other address family",
				"agents[1].ip: missing",
				"agents[1].overlays[0].backend.vxlan.vtep_ip: fd01::1 is no IPv4 address",
				"agents[1].overlays[0].backend.vxlan.vtep_ip6: 44.128.0.9 is no IPv6 address",
			}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, problems := dcosstate.Parse([]byte(tt.document))
			for i, p := range problems {
				if i >= len(tt.want) || !strings.HasPrefix(p.String(), tt.want[i]) {
					t.Errorf("problem %d: %s", i, p)
				}
			}
			if len(problems) != len(tt.want) {
				t.Errorf("%d problems, want %d: %v", len(problems), len(tt.want), problems)
			}
		})
	}
}

func TestParseSkips(t *testing.T) {
	agents, skipped, problems := dcosstate.Parse([]byte(`{"agents": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2", "overlays": []}]}`))
	if len(agents) != 0 || len(problems) != 0 || !cmp.Equal(skipped, []string{"agents[0]", "agents[1]"}) {
		t.Errorf("agents %v, skipped %v, problems %v", agents, skipped, problems)
	}
}
