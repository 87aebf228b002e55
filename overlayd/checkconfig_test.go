package main

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestCheckConfigReport(t *testing.T) {
	isolated := writeFile(t, "isolated.yaml", `
vtep_subnet: 44.128.0.0/30
vtep_mac_oui: 02:00:00:00:00:00
vtep_mtu: 1400
overlays:
- {name: tiny, subnet: 9.0.0.0/29, prefix: 29, enabled: false}
- {name: big, subnet: 10.0.0.0/8, prefix: 9, isolation: true}
`)
	for golden, path := range map[string]string{
		"check-overlay.txt":  filepath.Join("..", "conf", "examples", "overlay.yaml"),
		"check-config.txt":   filepath.Join("..", "conf", "examples", "config.yaml"),
		"check-isolated.txt": isolated,
	} {
		t.Run(golden, func(t *testing.T) {
			var stdout, stderr strings.Builder
			if code := run(t.Context(), []string{"check-config", path}, environment(nil), &stdout, &stderr); code != 0 || stderr.Len() > 0 {
				t.Fatalf("exit code %d, stderr %s", code, stderr.String())
			}
			golden = filepath.Join("testdata", golden)
			if *update {
				if err := os.WriteFile(golden, []byte(stdout.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), stdout.String()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestCheckConfigProblems(t *testing.T) {
	path := writeFile(t, "bad.yaml", "dcos_overlay_network:\n  vtep_subnet: 44.0.0.1/8\n  overlays:\n  - name: host\n    subnet: 9.0.0.0/8\n")
	var stdout, stderr strings.Builder
	code := run(t.Context(), []string{"check-config", path}, environment(nil), &stdout, &stderr)
	want := "overlayd check-config: " + path + `: 4 problems
  vtep_subnet: 44.0.0.1/8 has host bits set; write 44.0.0.0/8 (line 2)
  vtep_mac_oui: missing; give the first three bytes of the VTEP MACs, as in 70:B3:D5:00:00:00 (line 2)
  overlays[0].name: "host" is reserved by Docker; the reserved names are host, bridge, default, none (line 4)
  overlays[0].prefix: missing; give the length of the subnet each agent gets from 9.0.0.0/8 (line 4)
`
	if diff := cmp.Diff(want, stderr.String()); diff != "" || code != 2 || stdout.Len() > 0 {
		t.Errorf("exit code %d, stdout %q, stderr (-want +got):\n%s", code, stdout.String(), diff)
	}
}

func TestLimit(t *testing.T) {
	vtep := pool{"vtep_subnet", 4094, ""}
	tests := []struct {
		name  string
		pools []pool
		want  string
	}{
		{"addresses", []pool{vtep, {"overlays[0].subnet", 4095, "a"}}, "Limit: 4,094 agents, by vtep_subnet; no more can join."},
		{"an overlay", []pool{vtep, {"overlays[0].subnet", 256, "a"}, {"overlays[1].subnet", 512, "b"}},
			"Limit: 256 agents, by overlays[0].subnet; those after join without a subnet of a."},
		{"equal", []pool{vtep, {"overlays[0].subnet", 4094, "a"}}, "Limit: 4,094 agents, by vtep_subnet; no more can join."},
	}
	for _, tt := range tests {
		if got := limit(tt.pools); got != tt.want {
			t.Errorf("%s: %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

func TestCount(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0", 999: "999", 1000: "1,000", 65536: "65,536", 1234567: "1,234,567",
		1<<47 - 2: "140,737,488,355,326",
		1 << 62:   "> 10^15",
	} {
		if got := count(n); got != want {
			t.Errorf("count(%d) = %s, want %s", n, got, want)
		}
	}
}
