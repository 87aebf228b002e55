package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestImportState: what is reserved, what cannot be, and what is no usage.
func TestImportState(t *testing.T) {
	url := cluster(t)
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "state.json")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	agent := func(ip, vtep, overlay, subnet string) string {
		return `{"ip": "` + ip + `", "overlays": [{"backend": {"vxlan": {"vtep_ip": "` + vtep + `/20"}}, "info": {"name": "` + overlay + `"}, "` + subnet + `}]}`
	}
	good := file(`{"agents": [` + agent("10.7.0.1", "44.128.7.1", "off", `subnet6": "fd01:b:0:0:7::/80"`) + `, {"ip": "10.7.0.2"}]}`)
	bad := file(`{"agents": [` + agent("10.7.0.1", "44.127.7.1", "off", `subnet6": "fd01:b:0:0:7::/88"`) + `]}`)
	for _, tt := range []struct {
		args []string
		code int
		says []string
	}{
		{[]string{"--dry-run", good}, 0, []string{"1 leases would be reserved", "1 agents of the file hold nothing: agents[1]"}},
		{[]string{bad}, 2, []string{"nothing was reserved, for 2 of what it says", "\n  agents[0].overlays[0].backend.vxlan.vtep_ip: 44.127.7.1 is no block", "\n  agents[0].overlays[0].subnet6: "}},
		{[]string{"--list"}, 0, []string{"AGENT IP"}},
		{[]string{good, "-o", "wide"}, 0, []string{"10.7.0.1  44.128.7.1  off fd01:b:0:0:7::/80", "1 leases reserved"}},
		{[]string{"--list", "-o", "yaml"}, 0, []string{"agent_ip: 10.7.0.1"}},
		{[]string{good}, 0, []string{"0 leases reserved, 1 were before"}},
		{[]string{"--drop", "10.7.0.1,10.7.0.9"}, 0, []string{"1 reservations dropped"}},
		{[]string{"--drop", "all"}, 0, []string{"0 reservations dropped"}},
		{[]string{"--drop", "every"}, 2, []string{`"every" is neither`}},
		{[]string{"--list", good}, 2, []string{"name a FILE"}},
		{nil, 2, []string{"name a FILE"}},
		{[]string{good + ".absent"}, 1, []string{"no such file"}},
		{[]string{file("agents:")}, 2, []string{"is not JSON"}},
	} {
		code, out, errs := ctl(t, nil, append([]string{"import-state", "--coordinator", url}, tt.args...)...)
		if code != tt.code {
			t.Errorf("%q: exit code %d, want %d", tt.args, code, tt.code)
		}
		for _, want := range tt.says {
			if !strings.Contains(out+errs, want) {
				t.Errorf("%q does not say %q:\n%s%s", tt.args, want, out, errs)
			}
		}
	}
}
