package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

// The configuration of a cluster from plan to remove, as people type it.
func TestChangeOverlays(t *testing.T) {
	env := map[string]string{cli.EnvName("coordinator"): cluster(t)}
	file := func(text string) string {
		t.Helper()
		path := filepath.Join(t.TempDir(), "overlay.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const off = "    - {name: off, subnet6: fd01:b::/64, prefix6: 80, enabled: false}\n"
	config := func(overlays string) string {
		return "dcos_overlay_network:\n  vtep_subnet: 44.128.0.0/20\n  vtep_subnet6: fd01:a::/64\n  vtep_mac_oui: 70:B3:D5:00:00:00\n  overlays:\n" + overlays
	}
	larger := file(config("    - {name: dcos, subnet: 9.0.0.0/22, prefix: 24}\n" + off + "    - {name: late, subnet: 10.0.0.0/16, prefix: 26}\n"))
	smaller := file(config("    - {name: dcos, subnet: 9.0.0.0/24, prefix: 24}\n" + off))
	bad := file(config("    - {name: dcos, subnet: 9.0.0.0/23, prefix: 24, colour: red}\n    - {name: x, subnet: 9.0.0.0/24, prefix: 33}\n"))
	const plan = `OVERLAY  CHANGE                            HOSTS  CONTAINERS  EFFECT
-        vtep_subnet6 (none) -> fd01:a::/64 3 0 every host's VTEP has an IPv6 address of it
dcos     subnet 9.0.0.0/23 -> 9.0.0.0/22   2      0           it has room for more hosts; what is leased stays
late     added, with 10.0.0.0/16           3      0           every host gets a subnet, bridges and the files of the runtimes

OVERLAY  POOL          BEFORE                                                 AFTER
-        vtep_subnet   44.128.0.0/20, 3 of 4094                               44.128.0.0/20, 3 of 4094
-        vtep_subnet6  -    fd01:a::/64, 0 of 2^62 or more
dcos     subnet        9.0.0.0/23, 2 of 2, 125 containers per half            9.0.0.0/22, 2 of 4, 125 containers per half
off      subnet6       fd01:b::/64, 0 of 65536, 1023 containers per half      fd01:b::/64, 0 of 65536, 1023 containers per half
late     subnet        -                                                      10.0.0.0/16, 0 of 1024, 29 containers per half
`
	for _, tt := range []struct {
		args   []string
		code   int
		stdout string // all of it, or what begins with "...": a part
		stderr string // part
	}{
		{[]string{"plan", larger}, 0, plan, ""},
		{[]string{"plan", smaller}, 1, "...Refused: overlay dcos: subnet 9.0.0.0/24 with prefix 24 is configured, but leased is 9.0.1.0/24 by agent host-2; put back", ""},
		{[]string{"apply", smaller}, 1, "...Refused: overlay dcos", ""},
		{[]string{"plan", bad}, 2, "", bad + ": 3 problems\n  overlays[0].colour: "},
		{[]string{"apply", bad}, 2, "", "overlays[1].prefix: "},
		{[]string{"plan", "/nonexistent"}, 2, "", "/nonexistent: no such file"},
		{[]string{"plan"}, 2, "", "accepts 1 arg"},
		{[]string{"apply", larger}, 0, "...applied, as revision ", ""},
		{[]string{"apply", larger}, 0, "The configuration is what is served already.\nnothing to change\n", ""},
		{[]string{"drain", "late"}, 0, "...late     drained  0      0", ""},
		{[]string{"list"}, 0, "...drained; no container is left", ""},
		{[]string{"drain", "none"}, 1, "", `there is no overlay "none"`},
		{[]string{"undrain", "late"}, 0, "...no longer drained", ""},
		{[]string{"remove", "dcos"}, 1, "", "have not told whether containers are attached: 172.17.0.2 (agent host-1)"},
		{[]string{"remove", "dcos", "--force"}, 0, "...dcos     removed  2", ""},
		{nil, 0, "...The coordinator's configuration file differs from what is served", ""},
	} {
		code, stdout, stderr := ctl(t, env, append([]string{"overlays"}, tt.args...)...)
		part, some := strings.CutPrefix(tt.stdout, "...")
		if code != tt.code || some && !strings.Contains(stdout, part) || !strings.Contains(stderr, tt.stderr) {
			t.Errorf("%v: code %d, want %d\n%s%s", tt.args, code, tt.code, stdout, stderr)
		}
		if !some {
			if diff := cmp.Diff(strings.Fields(tt.stdout), strings.Fields(stdout)); diff != "" {
				t.Errorf("%v (-want +got):\n%s\n%s", tt.args, diff, stdout)
			}
		}
	}
	code, stdout, stderr := ctl(t, env, "overlays", "apply", file(config("    - {name: dcos, subnet: 9.0.0.0/22, prefix: 24}\n"+off)), "-o", "json")
	var p api.NetworkPlan
	if err := json.Unmarshal([]byte(stdout), &p); err != nil || code != 0 || !p.Applied || len(p.Changes) != 2 {
		t.Errorf("code %d, %v, %s\n%s", code, err, stderr, stdout)
	}
}
