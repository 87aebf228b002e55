package ucr

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseResult(t *testing.T) {
	tests := []struct {
		in, wrong string // wrong: part of the error; empty: accepted
		want      Result
	}{
		{in: `{}`},
		{in: "\n {\"cniVersion\":\"1.0.0\",\"ips\":[{\"address\":\"9.0.1.2/25\"}]} \n"}, // taken, and no address
		{in: `{"ip4":null,"ip6":null,"dns":null}`},
		{in: `{"IP4":{"ip":"9.0.1.2/25"}}`}, // case counts
		{
			in:   `{"ip4":{"ip":"9.0.1.2/25","gateway":"9.0.1.1","routes":[{"dst":"0.0.0.0/0"}]},"ip6":{"ip":"whatever"},"dns":{}}`,
			want: Result{IP4: &IPConfig{IP: "9.0.1.2/25", Gateway: "9.0.1.1", Routes: []Route{{Dst: "0.0.0.0/0"}}}, IP6: &IPConfig{IP: "whatever"}, DNS: &DNS{}},
		},
		{in: ``, wrong: "EOF"},
		{in: `null`, wrong: "not an object"},
		{in: `[]`, wrong: "cannot unmarshal"},
		{in: `{}{}`, wrong: "something follows"},
		{in: `{"ip4":{}}`, wrong: "required"},
		{in: `{"ip4":[]}`, wrong: "an object"},
		{in: `{"ip4":{"ip":5}}`, wrong: "a string"},
		{in: `{"ip4":{"ip":"9.0.1.2"}}`, wrong: "number of '/'"},
		{in: `{"ip4":{"ip":"9.0.1.2/33"}}`, wrong: "prefix length"},
		{in: `{"ip4":{"ip":"9.0.1.2/25/1"}}`, wrong: "prefix length"},
		{in: `{"ip4":{"ip":"fd00::1/64"}}`, wrong: "IPv4"},
		{in: `{"ip4":{"ip":"09.0.1.2/25"}}`, wrong: "IPv4"},
		{in: `{"ip4":{"ip":"9.0.1.2/25","routes":[{"gw":"9.0.1.1"}]}}`, wrong: "required"},
		{in: `{"dns":{"nameservers":"9.9.9.9"}}`, wrong: "an array"},
	}
	for _, tt := range tests {
		got, err := ParseResult([]byte(tt.in))
		switch {
		case tt.wrong == "" && err != nil, tt.wrong != "" && (err == nil || !strings.Contains(err.Error(), tt.wrong)):
			t.Errorf("%s: error %v, want %q", tt.in, err, tt.wrong)
		case err == nil:
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", tt.in, diff)
			}
		}
	}
}

func TestStdin(t *testing.T) {
	conf := map[string]any{"type": "m-overlay", "name": "dcos", "args": map[string]any{"x": 1}}
	got, err := Stdin(conf, NetworkInfo{
		Name: "dcos", Addresses: []string{"9.0.1.9"}, Labels: [][2]string{{"app", "a"}},
		PortMappings: []PortMapping{{HostPort: 31005, ContainerPort: 80, Protocol: "tcp"}, {HostPort: 31006, ContainerPort: 81}},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"args":{"org.apache.mesos":{"network_info":{` +
		`"ip_addresses":[{"ip_address":"9.0.1.9","protocol":"IPv4"}],` +
		`"labels":{"labels":[{"key":"app","value":"a"}]},"name":"dcos",` +
		`"port_mappings":[{"container_port":80,"host_port":31005,"protocol":"tcp"},{"container_port":81,"host_port":31006}]}},"x":1},` +
		`"name":"dcos","type":"m-overlay"}`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("stdin (-want +got):\n%s", diff)
	}
	conf["args"] = map[string]any{"org.apache.mesos": map[string]any{}}
	if _, err := Stdin(conf, NetworkInfo{Name: "dcos"}); err == nil {
		t.Error("a file that sets Mesos' own args was accepted")
	}
}
