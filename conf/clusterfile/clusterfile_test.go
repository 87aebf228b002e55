package clusterfile_test

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/clusterfile"
)

var prefixes = cmpopts.EquateComparable(netip.Prefix{})

// documented is what the two documented examples say.
func documented() (overlay, config conf.Network) {
	prefix := netip.MustParsePrefix
	overlay = conf.Network{
		VTEPSubnet: prefix("44.128.0.0/20"), VTEPSubnet6: prefix("fd01:a::/64"), VTEPMACOUI: "70:B3:D5:00:00:00",
		Overlays: []conf.Overlay{
			{Name: "dcos", Subnet: prefix("9.0.0.0/8"), Prefix: 24},
			{Name: "dcos6", Subnet6: prefix("fd01:b::/64"), Prefix6: 80},
		},
	}
	config = conf.Network{
		VTEPSubnet: prefix("44.128.0.0/20"), VTEPMACOUI: "70:B3:D5:00:00:00",
		Overlays: []conf.Overlay{
			{Name: "dcos", Subnet: prefix("9.0.0.0/8"), Prefix: 26},
			{Name: "dcos-1", Subnet: prefix("192.168.0.0/16"), Prefix: 24},
		},
	}
	return overlay, config
}

func TestExamplesLoad(t *testing.T) {
	overlay, config := documented()
	want := map[string]conf.Network{"overlay.yaml": overlay, "config.yaml": config}
	files, err := filepath.Glob("../examples/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		name := filepath.Base(path)
		if name == "agent.yaml" { // the daemon reads it, with its flags
			continue
		}
		t.Run(name, func(t *testing.T) {
			got, problems, err := clusterfile.LoadFile(path)
			if err != nil || problems != nil {
				t.Fatalf("LoadFile: %v, %v", problems, err)
			}
			if diff := cmp.Diff(want[name], got, prefixes); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			delete(want, name)
		})
	}
	if len(want) > 0 {
		t.Errorf("examples not found: %v", want)
	}
}

func TestLoadAccepts(t *testing.T) {
	overlay, _ := documented()
	asJSON, err := json.MarshalIndent(overlay, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	const bare = `
vtep_subnet: 44.128.0.0/20
vtep_subnet6: fd01:a::/64
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
- {name: dcos, subnet: 9.0.0.0/8, prefix: 24}
- {name: dcos6, subnet6: "fd01:b::/64", prefix6: 80}
`
	indented := strings.ReplaceAll(bare, "\n", "\n  ")
	tests := []struct{ name, in string }{
		{"bare YAML", bare},
		{"bare JSON, indented with tabs", string(asJSON)},
		{"wrapped JSON on one line", `{"dcos_overlay_network":` + strings.ReplaceAll(string(asJSON), "\n", "") + `}`},
		{"byte order mark", "\ufeff" + bare},
		{"CRLF", strings.ReplaceAll(bare, "\n", "\r\n")},
		{"document marker and comments", "# ours\n---\n" + bare + "# end\n"},
		{"keys without a value", bare + "vtep_mtu:\n"},
		{"MTU 0", bare + "vtep_mtu: 0\n"},
		{"an anchor nobody uses", strings.Replace(bare, "44.128", "&a 44.128", 1)},
		{"other keys are not looked at", "a: &a [1]\nb: *a\nb: 010\n<<: {c: 1}\n? [x]\n: 1\ndcos_overlay_network:" + indented + "\noverlays: 7\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, problems, err := clusterfile.Load(strings.NewReader(tt.in))
			if err != nil || problems != nil {
				t.Fatalf("Load: %v, %v", problems, err)
			}
			if diff := cmp.Diff(overlay, got, prefixes); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestLoadReadsEveryField(t *testing.T) {
	no := false
	got, problems, err := clusterfile.Load(strings.NewReader(`
vtep_subnet: 44.128.0.0/20
vtep_subnet6: fd01:a::/64
vtep_mac_oui: 70:b3:d5:00:00:00
vtep_mtu: 1400
overlays:
- name: both
  subnet: 9.0.0.0/8
  prefix: 24
  subnet6: fd01:b::/64
  prefix6: 80
  enabled: false
  isolation: true
`))
	if err != nil || problems != nil {
		t.Fatalf("Load: %v, %v", problems, err)
	}
	prefix := netip.MustParsePrefix
	want := conf.Network{
		VTEPSubnet: prefix("44.128.0.0/20"), VTEPSubnet6: prefix("fd01:a::/64"), VTEPMACOUI: "70:b3:d5:00:00:00", VTEPMTU: 1400,
		Overlays: []conf.Overlay{{
			Name: "both", Subnet: prefix("9.0.0.0/8"), Prefix: 24, Subnet6: prefix("fd01:b::/64"), Prefix6: 80,
			Enabled: &no, Isolation: conf.IsolationOf(true),
		}},
	}
	if diff := cmp.Diff(want, got, prefixes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestLoadReportsProblems(t *testing.T) {
	const head = "vtep_subnet: 44.128.0.0/20\nvtep_mac_oui: 70:B3:D5:00:00:00\n" // two lines
	const good = head + "overlays:\n- name: a\n"                                 // two more; wants a subnet
	const whole = good + "  subnet: 9.0.0.0/8\n  prefix: 24\n"                   // six in all
	tests := []struct {
		name, in string
		want     []string // every problem, word for word
	}{
		{"unknown key", whole + "colour: red\n",
			[]string{"colour: unknown key; the keys are vtep_subnet, vtep_subnet6, vtep_mac_oui, vtep_mtu, reclaim, overlays (line 7)"}},
		{"misspelt key", strings.Replace(whole, "vtep_subnet", "vtep_subent", 1),
			[]string{`vtep_subent: unknown key; did you mean "vtep_subnet"? (line 1)`}},
		{"misspelt keys of an overlay", strings.NewReplacer("  subnet", "  Subnets", "prefix", "prefx").Replace(whole),
			[]string{`overlays[0].Subnets: unknown key; did you mean "subnet"? (line 5)`, `overlays[0].prefx: unknown key; did you mean "prefix"? (line 6)`}},
		{"unknown key of an overlay", whole + "  vlan: 7\n",
			[]string{"overlays[0].vlan: unknown key; the keys are name, subnet, prefix, subnet6, prefix6, enabled, isolation, allow, antispoof, blocks_per_agent, halves (line 7)"}},
		{"misspelt network key", "dcos_overlay_networks: {}\n",
			[]string{`dcos_overlay_network: missing; is "dcos_overlay_networks" meant to be it? (line 1)`}},
		{"something else", "a: 1\n",
			[]string{"dcos_overlay_network: missing; want this key, or its object alone with vtep_subnet, vtep_mac_oui and overlays (line 1)"}},
		{"a list", "- 1\n", []string{"dcos_overlay_network: missing; the document is a list, want an object with this key (line 1)"}},
		{"a word", "hello\n", []string{`dcos_overlay_network: missing; the document is the string "hello", want an object with this key (line 1)`}},
		{"network is a list", "dcos_overlay_network: []\n",
			[]string{"dcos_overlay_network: want an object with vtep_subnet, vtep_mac_oui and overlays, have a list (line 1)"}},
		{"network is nothing", "dcos_overlay_network:\n",
			[]string{"dcos_overlay_network: want an object with vtep_subnet, vtep_mac_oui and overlays, have nothing (line 1)"}},
		{"network given twice", "dcos_overlay_network: {vtep_subnet: 44.0.0.0/8, vtep_mac_oui: '02:00:00:00:00:00', overlays: [{name: a, subnet: 9.0.0.0/8, prefix: 9}]}\ndcos_overlay_network: 1\n",
			[]string{"dcos_overlay_network: given twice; keep one (line 2)"}},

		{"duplicate key", whole + "vtep_mac_oui: 02:00:00:00:00:00\n", []string{"vtep_mac_oui: given twice, first on line 2; keep one (line 7)"}},
		{"duplicate key of an overlay", whole + "  prefix: 25\n", []string{"overlays[0].prefix: given twice, first on line 6; keep one (line 7)"}},
		{"merge key", "x: &x {subnet: 9.0.0.0/8}\ndcos_overlay_network:\n  vtep_subnet: 44.0.0.0/8\n  vtep_mac_oui: 70:B3:D5:00:00:00\n  overlays:\n  - <<: *x\n    name: a\n    prefix: 9\n",
			[]string{
				"overlays[0]: << cannot be a key here; write every key out (line 6)",
				"overlays[0].subnet: missing, but its prefix 9 is given; give both or neither (line 6)",
			}},
		{"alias", "x: &x 9.0.0.0/8\ndcos_overlay_network:\n  vtep_subnet: *x\n  vtep_mac_oui: 70:B3:D5:00:00:00\n  overlays: [{name: a, subnet: 9.0.0.0/8, prefix: 9}]\n",
			[]string{"vtep_subnet: want an address range like 9.0.0.0/8 or fd01:b::/64, have the alias *x (aliases are not followed; write the value out) (line 3)"}},
		{"key that is a list", whole + "? [a, b]\n: 1\n", []string{"a list cannot be a key here; write every key out (line 7)"}},

		{"overlays is an object", head + "overlays: {name: a}\n",
			[]string{"overlays: want a list of overlays, each beginning with a dash, have an object (line 3)"}},
		{"overlay is a string", whole + "- b\n", []string{`overlays[1]: want an object with name, subnet and prefix, have the string "b" (line 7)`}},
		{"overlays is empty", head + "overlays: []\n", []string{"overlays: missing or empty; configure at least one overlay (line 3)"}},
		{"name is a number", strings.Replace(whole, "name: a", "name: 12", 1),
			[]string{`overlays[0].name: want a string, that is with quotes: "12", have the number 12 (line 4)`}},
		{"name is a truth value", strings.Replace(whole, "name: a", "name: true", 1),
			[]string{`overlays[0].name: want a string, that is with quotes: "true", have true (line 4)`}},
		{"name is nothing", strings.Replace(whole, "name: a", "name:", 1),
			[]string{"overlays[0].name: missing; give the overlay a name of 1 to 13 characters (line 4)"}},
		{"own tag", strings.Replace(whole, "name: a", "name: !mine a", 1),
			[]string{`overlays[0].name: want a string, that is with quotes: "a", have a value with the tag !mine (line 4)`}},
		{"subnet is not a range", strings.Replace(whole, "9.0.0.0/8", "nine", 1),
			[]string{`overlays[0].subnet: "nine" is not an address range like 9.0.0.0/8 or fd01:b::/64: no '/' (line 5)`}},
		{"subnet with leading zeros", strings.Replace(whole, "9.0.0.0/8", "09.0.0.0/8", 1),
			[]string{`overlays[0].subnet: "09.0.0.0/8" is not an address range like 9.0.0.0/8 or fd01:b::/64: ParseAddr("09.0.0.0"): IPv4 field has octet with leading zero (line 5)`}},
		{"subnet with a zone", good + "  subnet6: fe80::%eth0/64\n  prefix6: 80\n",
			[]string{`overlays[0].subnet6: "fe80::%eth0/64" is not an address range like 9.0.0.0/8 or fd01:b::/64: IPv6 zones cannot be present in a prefix (line 5)`}},
		{"subnet is a list", strings.Replace(whole, "9.0.0.0/8", "[9.0.0.0/8]", 1),
			[]string{"overlays[0].subnet: want an address range like 9.0.0.0/8 or fd01:b::/64, have a list (line 5)"}},
		{"unreadable subnet without prefix", good + "  subnet: 9.0.0.0\n",
			[]string{`overlays[0].subnet: "9.0.0.0" is not an address range like 9.0.0.0/8 or fd01:b::/64: no '/' (line 5)`}},
		{"prefix in quotes", strings.Replace(whole, "24", `"24"`, 1), []string{`overlays[0].prefix: want a number without quotes, have the string "24" (line 6)`}},
		{"prefix like an octal number", strings.Replace(whole, "24", "030", 1),
			[]string{"overlays[0].prefix: 030 can be read in more than one way; write a plain decimal number (line 6)"}},
		{"prefix in hex", strings.Replace(whole, "24", "0x18", 1),
			[]string{"overlays[0].prefix: 0x18 can be read in more than one way; write a plain decimal number (line 6)"}},
		{"prefix with a sign", strings.Replace(whole, "24", "+24", 1),
			[]string{"overlays[0].prefix: +24 can be read in more than one way; write a plain decimal number (line 6)"}},
		{"prefix with an underscore", strings.Replace(whole, "24", "2_4", 1),
			[]string{"overlays[0].prefix: 2_4 can be read in more than one way; write a plain decimal number (line 6)"}},
		{"prefix with a point", strings.Replace(whole, "24", "24.0", 1), []string{"overlays[0].prefix: want a number without quotes, have the number 24.0 (line 6)"}},
		{"prefix with a slash", strings.Replace(whole, "24", "/24", 1), []string{`overlays[0].prefix: want a number without quotes, have the string "/24" (line 6)`}},
		{"prefix out of range", strings.Replace(whole, "24", "33", 1), []string{"overlays[0].prefix: 33: want a number from 1 to 32 (line 6)"}},
		{"prefix 0", strings.Replace(whole, "24", "0", 1), []string{"overlays[0].prefix: 0: want a number from 1 to 32 (line 6)"}},
		{"huge number", strings.Replace(whole, "24", "9223372036854775808", 1), []string{"overlays[0].prefix: 9223372036854775808: want a number from 1 to 32 (line 6)"}},
		{"negative MTU", whole + "vtep_mtu: -1\n", []string{"vtep_mtu: -1: want a number from 0 to 65535 (line 7)"}},
		{"small MTU", whole + "vtep_mtu: 551\n", []string{"vtep_mtu: 551: must be between 552 and 65535, or left out to follow the host's network (line 7)"}},
		{"enabled is a word", whole + "  enabled: yes\n", []string{`overlays[0].enabled: want true or false, without quotes, have the string "yes" (line 7)`}},
		{"isolation is a number", whole + "  isolation: 1\n", []string{"overlays[0].isolation: want overlay, strict or none, have the number 1 (line 7)"}},
		{"isolation has another name", whole + "  isolation: full\n", []string{`overlays[0].isolation: "full": want overlay, strict or none (or true or false, without quotes) (line 7)`}},
		{"allow is a name", whole + "  allow: b\n", []string{`overlays[0].allow: want a list of names of overlays, have the string "b" (line 7)`}},
		{"allow names what is not there", whole + "  allow: [b, a, b]\n", []string{
			`overlays[0].allow[0]: there is no overlay "b" (line 7)`,
			`overlays[0].allow[1]: "a" is this overlay itself, whose containers always reach each other; leave it out (line 7)`,
			`overlays[0].allow[2]: there is no overlay "b" (line 7)`}},
		{"antispoof is a word", whole + "  antispoof: maybe\n", []string{`overlays[0].antispoof: want true or false, without quotes, have the string "maybe" (line 7)`}},
		{"allow without isolation", whole + "  isolation: none\n  allow: [a]\n", []string{"overlays[0].allow: without isolation there is nothing to allow; leave it out, or choose isolation overlay or strict (line 8)"}},

		{"all at once, in the order of lines", "overlays:\n- name: host\n  subnet: 9.0.0.1/8\n  prefix: x\n- 7\nvtep_subnet: 44.0.0.0/7\nvtep_mac: 1\n",
			[]string{
				`overlays[0].name: "host" is reserved by Docker; the reserved names are host, bridge, default, none (line 2)`,
				"overlays[0].subnet: 9.0.0.1/8 has host bits set; write 9.0.0.0/8 (line 3)",
				`overlays[0].prefix: want a number without quotes, have the string "x" (line 4)`,
				"overlays[1]: want an object with name, subnet and prefix, have the number 7 (line 5)",
				"vtep_subnet: 44.0.0.0/7 is too large: VTEP MACs are made from the last 24 bits of the address, so use a /8 or longer (line 6)",
				`vtep_mac: unknown key; did you mean "vtep_mac_oui"? (line 7)`,
			}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, problems, err := clusterfile.Load(strings.NewReader(tt.in))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, p := range problems {
				got = append(got, p.String())
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("problems (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLoadRefusesTheWholeFile(t *testing.T) {
	bomb := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'k'; c++ {
		bomb += string(c) + ": &" + string(c) + " [" + strings.Repeat("*"+string(c-1)+",", 9) + "]\n"
	}
	tests := []struct{ name, in, want string }{
		{"empty", "", "the file is empty"},
		{"only comments", "# nothing\n", "the file is empty"},
		{"second document", "a: 1\n---\nb: 2\n", "line 2: a second YAML document begins; keep one"},
		{"too large", "a: " + strings.Repeat("x", 256<<10), "larger than 256 KiB"},
		{"tabs", "vtep_subnet: 44.0.0.0/8\noverlays:\n\t- name: a\n", "line 3 is indented with a tab; use spaces"},
		{"broken YAML", "a: [1\n", "not YAML: line "},
		{"broken second document", "a: 1\n---\n[", "not YAML: line "},
		{"two keys on a line", "a: b: c\n", "not YAML: mapping values are not allowed in this context"},
		{"UTF-16", "\xff\xfea\x00:\x00", "not UTF-8 text; save the file as UTF-8"},
		{"control characters", "a: \x00\n", "not YAML: control characters are not allowed"},
		{"alias of nothing", "a: *b\n", "not YAML: unknown anchor 'b' referenced"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, problems, err := clusterfile.Load(strings.NewReader(tt.in))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Load: problems %v, error %v; want an error with %q", problems, err, tt.want)
			}
		})
	}
	t.Run("alias bomb is never expanded", func(t *testing.T) {
		_, problems, err := clusterfile.Load(strings.NewReader(bomb + "dcos_overlay_network: *j\n"))
		if err != nil || len(problems) != 1 || !strings.Contains(problems[0].Text, "have the alias *j") {
			t.Errorf("Load: %v, %v", problems, err)
		}
	})
}

func TestLoadFileNamesTheFile(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty.yaml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{empty, dir, filepath.Join(dir, "absent.yaml")} {
		if _, _, err := clusterfile.LoadFile(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("LoadFile(%s) = %v, want an error that names the file", path, err)
		}
	}
}

func TestLoadFlags(t *testing.T) {
	known := []string{"coordinator", "agent-ip", "agent-id", "insecure", "listen", "cni-bin-dir"}
	path := filepath.Join(t.TempDir(), "agent.yaml")
	load := func(content string) (map[string][]string, []conf.Problem, error) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return clusterfile.LoadFlags(path, known)
	}

	got, problems, err := load("coordinator:\n- http://a:1\n- http://b:2\nagent-id: 0123\ninsecure: true\nlisten: \"\"\ncni-bin-dir: []\nagent-ip:\n")
	if err != nil || problems != nil {
		t.Fatalf("LoadFlags: %v, %v", problems, err)
	}
	want := map[string][]string{
		"coordinator": {"http://a:1", "http://b:2"}, "agent-id": {"0123"}, "insecure": {"true"}, "listen": {""}, "cni-bin-dir": {},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("values (-want +got):\n%s", diff)
	}

	_, problems, err = load("cordinator: x\nagent-ip: {a: 1}\nlisten: [[a]]\n--insecure: true\nagent-id: a\nagent-id: b\n")
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, p := range problems {
		texts = append(texts, p.String())
	}
	wantTexts := []string{
		`cordinator: unknown key; did you mean "coordinator"? (line 1)`,
		"agent-ip: want a value or a list of values, have an object (line 2)",
		"listen: want a value or a list of values, have a list (line 3)",
		`--insecure: unknown key; did you mean "insecure"? (line 4)`,
		"agent-id: given twice, first on line 5; keep one (line 6)",
	}
	if diff := cmp.Diff(wantTexts, texts); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}

	for _, content := range []string{"", "# agent-id: a\n#listen: b\n"} {
		if got, problems, err := load(content); len(got) > 0 || problems != nil || err != nil {
			t.Errorf("LoadFlags of %q = %v, %v, %v, want nothing set", content, got, problems, err)
		}
	}
	for content, want := range map[string]string{"- a\n": "have a list", "a: [\n": "not YAML"} {
		if _, _, err := load(content); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("LoadFlags of %q = %v, want an error with %q and the file's name", content, err, want)
		}
	}
}

// FuzzLoad: no input makes Load panic, and what it accepts is the same after a
// trip through JSON.
func FuzzLoad(f *testing.F) {
	for _, name := range []string{"overlay.yaml", "config.yaml"} {
		data, err := os.ReadFile(filepath.Join("..", "examples", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	for _, seed := range []string{
		"", "\ufeff", "---\n", "a: 1\n---\nb: 2\n", "a: &a [*a]\n", "dcos_overlay_network: *x\n", "? [a]\n: b\n",
		`{"vtep_subnet":"44.0.0.0/8","vtep_mac_oui":"02:00:00:00:00:00","vtep_mtu":1400,"overlays":[{"name":"a","subnet":"9.0.0.0/8","prefix":010,"enabled":false,"isolation":true}]}`,
		`{"vtep_subnet":"44.0.0.0/8","vtep_mac_oui":"02:00:00:00:00:00","overlays":[{"name":"a","subnet":"9.0.0.0/8","prefix":10,"enabled":true}]}`,
		"overlays:\n- <<: {name: a}\n  name: [a]\n- *b\n- !!binary aGk=\n",
		"vtep_mtu: 99999999999999999999\nvtep_subnet: ::ffff:1.2.3.0/120\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		n, problems, err := clusterfile.Load(bytes.NewReader(data))
		if err != nil || problems != nil {
			return
		}
		encoded, err := json.Marshal(n)
		if err != nil {
			t.Fatal(err)
		}
		again, problems, err := clusterfile.Load(bytes.NewReader(encoded))
		if err != nil || problems != nil {
			t.Fatalf("%s: %v, %v", encoded, problems, err)
		}
		if diff := cmp.Diff(n, again, prefixes); diff != "" {
			t.Errorf("through JSON (-first +second):\n%s", diff)
		}
	})
}
