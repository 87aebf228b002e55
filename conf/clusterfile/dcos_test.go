package clusterfile_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/clusterfile"
)

const dcosConfig = `
cluster_name: a
dcos_overlay_network:
  vtep_subnet: 44.128.0.0/20
  vtep_mac_oui: 70:B3:D5:00:00:00
  overlays:
  - {name: dcos, subnet: 9.0.0.0/8, prefix: 26}
  - {name: two, subnet: 10.0.0.0/8, prefix: 26, enabled: true}
`

func loadNotes(t *testing.T, text string) (conf.Network, []string, []string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n, notes, problems, err := clusterfile.LoadFileNotes(path)
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, p := range problems {
		texts = append(texts, p.String())
	}
	return n, notes, texts
}

// What DC/OS has beside the network is honoured, and said.
func TestSettingsBeside(t *testing.T) {
	for _, tc := range []struct {
		name, more string
		mtu        int
		enabled    bool
		notes      int
		problem    string
	}{
		{name: "nothing", enabled: true},
		{name: "MTU", more: "dcos_overlay_mtu: 1300\n", mtu: 1300, enabled: true, notes: 1},
		{name: "MTU as a string, as DC/OS wants it", more: "dcos_overlay_mtu: '1300'\n", mtu: 1300, enabled: true, notes: 1},
		{name: "MTU without a value", more: "dcos_overlay_mtu:\n", enabled: true},
		{name: "MTU that is none", more: "dcos_overlay_mtu: large\n", enabled: true, problem: `dcos_overlay_mtu: "large": want a number`},
		{name: "MTU too small", more: "dcos_overlay_mtu: 3\n", enabled: true, mtu: 3, notes: 1, problem: "(line 9)"},
		{name: "MTU that can be read in two ways", more: "dcos_overlay_mtu: 01300\n", enabled: true, problem: "want a number"},
		{name: "MTU that is a list", more: "dcos_overlay_mtu: [1300]\n", enabled: true, problem: "want a number"},
		{name: "MTU twice", more: "dcos_overlay_mtu: 1300\ndcos_overlay_mtu: 1400\n", mtu: 1300, enabled: true, notes: 1, problem: "given twice"},
		{name: "MTU in both places", more: "  vtep_mtu: 1400\ndcos_overlay_mtu: 1300\n", mtu: 1400, enabled: true, problem: "but vtep_mtu is 1400"},
		{name: "the same MTU in both places", more: "  vtep_mtu: 1300\ndcos_overlay_mtu: 1300\n", mtu: 1300, enabled: true, notes: 1},
		{name: "disabled", more: "dcos_overlay_enable: 'false'\n", notes: 1},
		{name: "disabled, plain", more: "dcos_overlay_enable: false\n", notes: 1},
		{name: "enabled", more: "dcos_overlay_enable: 'true'\n", enabled: true},
		{name: "neither", more: "dcos_overlay_enable: maybe\n", enabled: true, problem: "dcos_overlay_enable: want true or false"},
		{name: "before the network", more: "", enabled: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n, notes, problems := loadNotes(t, dcosConfig+tc.more)
			if n.VTEPMTU != tc.mtu || len(notes) != tc.notes {
				t.Errorf("MTU %d, notes %q; want %d and %d notes", n.VTEPMTU, notes, tc.mtu, tc.notes)
			}
			for _, o := range n.Overlays {
				if o.IsEnabled() != tc.enabled {
					t.Errorf("overlay %s is enabled: %t", o.Name, o.IsEnabled())
				}
			}
			if tc.problem == "" && problems != nil || tc.problem != "" && !strings.Contains(strings.Join(problems, "\n"), tc.problem) {
				t.Errorf("problems %q, want %q", problems, tc.problem)
			}
		})
	}
}

// The network may be a string that holds it, as JSON or YAML.
func TestNetworkInAString(t *testing.T) {
	want, _, _ := loadNotes(t, dcosConfig)
	const asJSON = `{"vtep_subnet":"44.128.0.0/20","vtep_mac_oui":"70:B3:D5:00:00:00","overlays":[` +
		`{"name":"dcos","subnet":"9.0.0.0/8","prefix":26},{"name":"two","subnet":"10.0.0.0/8","prefix":26,"enabled":true}]}`
	block := strings.ReplaceAll(dcosConfig[strings.Index(dcosConfig, "  vtep_subnet"):], "\n  ", "\n    ")
	for name, text := range map[string]string{
		"JSON in single quotes":   "dcos_overlay_network: '" + asJSON + "'\n",
		"JSON in double quotes":   "dcos_overlay_network: " + strconv.Quote(asJSON) + "\n",
		"JSON in a block":         "dcos_overlay_network: |\n  " + asJSON + "\n",
		"JSON in a folded block":  "dcos_overlay_network: >\n  " + asJSON + "\n",
		"YAML in a block":         "dcos_overlay_network: |\n  " + block,
		"with its key":            "dcos_overlay_network: '{\"dcos_overlay_network\": " + asJSON + "}'\n",
		"the whole file is JSON":  `{"dcos_overlay_network": ` + strconv.Quote(asJSON) + "}",
		"with a setting beside":   "dcos_overlay_enable: 'true'\ndcos_overlay_network: '" + asJSON + "'\n",
		"with blanks around":      "dcos_overlay_network: '  " + asJSON + "  '\n",
		"JSON over several lines": "dcos_overlay_network: '" + strings.ReplaceAll(asJSON, ",", ",\n    ") + "'\n",
	} {
		n, _, problems := loadNotes(t, text)
		if diff := cmp.Diff(want, n, prefixes); problems != nil || diff != "" {
			t.Errorf("%s: problems %q, (-want +got):\n%s", name, problems, diff)
		}
	}
	for text, problem := range map[string]string{
		"dcos_overlay_network: '{'\n":                              "dcos_overlay_network: is a string that does not hold the configuration",
		"dcos_overlay_network: nine\n":                             `want an object with vtep_subnet, vtep_mac_oui and overlays, have the string "nine"`,
		"dcos_overlay_network: '[1:2]'\n":                          "want an object",
		"a: 1\ndcos_overlay_network: |\n  vtep_subent: a\n":        "vtep_subent: unknown key; did you mean \"vtep_subnet\"? (line 3)",
		"a: 1\ndcos_overlay_network: '{\"vtep_subent\": \"a\"}'\n": "vtep_subent: unknown key; did you mean \"vtep_subnet\"? (line 2)",
	} {
		if _, _, problems := loadNotes(t, text); !strings.Contains(strings.Join(problems, "\n"), problem) {
			t.Errorf("%s: problems %q, want %q", text, problems, problem)
		}
	}
}
