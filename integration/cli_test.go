package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestCheckConfig: what it would do, or every problem at once.
func TestCheckConfig(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	must(t, os.WriteFile(bad, []byte(`
dcos_overlay_network:
  vtep_subnet: 44.128.0.0/20
  vtep_mac_oui: 70:B3:D5:00:00:00
  overlays:
    - {name: dcos, subnet: 9.0.0.0/8, prefix: 7}
    - {name: docker-bridge-net, subnet: 9.1.0.0/16, prefix: 24}
`), 0o644))
	for _, c := range []struct {
		name   string
		argv   []string
		status int
		want   []string
	}{
		{"good", []string{"overlayd", "check-config", filepath.Join(top, "conf/examples/overlay.yaml")}, 0,
			[]string{"dcos", "9.0.0.0/8", "65,536", "125", "dcos6"}},
		{"bad", []string{"overlayd", "check-config", bad}, 2,
			[]string{"overlays[0].prefix", "overlays[1].name", "overlap"}},
		{"absent", []string{"overlayd", "check-config", bad + ".absent"}, 2, []string{"bad.yaml.absent"}},
		{"no file", []string{"overlayd", "check-config"}, 2, nil},
		{"no subcommand", []string{"overlayd"}, 2, []string{"coordinator", "agent", "check-config", "version"}},
		{"unknown subcommand", []string{"overlayd", "fly"}, 2, []string{"fly"}},
		{"unknown flag", []string{"overlayd", "agent", "--wings"}, 2, []string{"wings"}},
		{"no coordinator", []string{"overlayd", "agent", "--insecure"}, 2, []string{"--coordinator"}},
		{"coordinator with a bad configuration", []string{"overlayd", "coordinator", "--insecure", "--config", bad}, 2, []string{"overlays[0].prefix", "overlays[1].name"}},
		{"version", []string{"overlayd", "version"}, 0, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, status := program(t, c.argv...)
			if status != c.status {
				t.Errorf("status %d, want %d; output:\n%s", status, c.status, out)
			}
			for _, w := range c.want {
				if !strings.Contains(out, w) {
					t.Errorf("no %q in:\n%s", w, out)
				}
			}
			if strings.Contains(out, "panic") {
				t.Errorf("a panic:\n%s", out)
			}
		})
	}
}
