// Package clusterfile reads the YAML an operator writes: the cluster
// configuration of the coordinator and the configuration file of an agent. It
// is apart from package conf so that the CNI programs need not link a YAML
// parser.
//
// The documents are read strictly: what would be ignored or guessed at
// (unknown and duplicate keys, aliases, a second document, numbers like 010)
// is a problem that names its line.
package clusterfile

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"overlayd.internal/overlay/conf"
)

// Key is the key of the cluster configuration in a config.yaml.
const Key = "dcos_overlay_network"

var (
	networkKeys = []string{"vtep_subnet", "vtep_subnet6", "vtep_mac_oui", "vtep_mtu", "reclaim", "overlays"}
	overlayKeys = []string{"name", "subnet", "prefix", "subnet6", "prefix6", "enabled", "isolation", "allow", "antispoof", "blocks_per_agent", "halves"}
)

// LoadFile is Load of the file at path.
func LoadFile(path string) (conf.Network, []conf.Problem, error) {
	n, _, problems, err := LoadFileNotes(path)
	return n, problems, err
}

// LoadFileNotes is LoadFile that also says, in sentences, what settings beside
// the cluster configuration made of it.
func LoadFileNotes(path string) (conf.Network, []string, []conf.Problem, error) {
	f, err := os.Open(path)
	if err != nil {
		return conf.Network{}, nil, nil, fmt.Errorf("read the cluster configuration: %w", err)
	}
	defer f.Close()
	n, notes, problems, err := load(f)
	if err != nil {
		return conf.Network{}, nil, nil, fmt.Errorf("read the cluster configuration %s: %w", path, err)
	}
	return n, notes, problems, nil
}

// Load reads the cluster configuration: a whole config.yaml, of which only the
// keys dcos_overlay_network, dcos_overlay_mtu and dcos_overlay_enable are looked
// at, or the object under the first alone, as YAML or JSON. That object may also
// be a string that holds it, as DC/OS passes it on. Load returns everything that
// is wrong, in the order of the lines; the Network is good for use only if that
// is nothing. The error is for a file that could not be read as one YAML
// document at all.
func Load(r io.Reader) (conf.Network, []conf.Problem, error) {
	n, _, problems, err := load(r)
	return n, problems, err
}

func load(r io.Reader) (conf.Network, []string, []conf.Problem, error) {
	root, err := document(r)
	if err != nil {
		return conf.Network{}, nil, nil, err
	}
	l := loader{lines: map[string]int{}}
	object := l.object(root)
	if object == nil {
		return conf.Network{}, nil, l.sorted(), nil
	}
	n := l.network(object)
	if object != root {
		l.beside(root, &n)
	}
	for _, p := range n.Validate() {
		if !l.isConsequence(p.Path) {
			l.add(p.Path, "%s", p.Text)
		}
	}
	return n, l.notes, l.sorted(), nil
}

// loader walks the nodes of one document.
type loader struct {
	problems []located
	notes    []string
	lines    map[string]int // where the value of a path stands
	// spoilt are paths whose value was given but could not be read, so that
	// Validate calls them missing; one that ends in a dot stands for all below.
	spoilt []string
}

// located is a Problem and its line, 0 if it has none.
type located struct {
	conf.Problem
	line int
}

// add records a problem of the value at path, or, if it is not there, of the
// nearest object around it.
func (l *loader) add(path, format string, args ...any) {
	line, at := 0, path
	for line == 0 {
		line = l.lines[at]
		if at == "" {
			break
		}
		at = at[:max(0, strings.LastIndexAny(at, ".["))]
	}
	l.addAt(line, path, format, args...)
}

func (l *loader) addAt(line int, path, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if line > 0 {
		text += fmt.Sprintf(" (line %d)", line)
	}
	l.problems = append(l.problems, located{conf.Problem{Path: path, Text: text}, line})
}

func (l *loader) sorted() []conf.Problem {
	slices.SortStableFunc(l.problems, func(a, b located) int { return a.line - b.line })
	var out []conf.Problem
	for _, p := range l.problems {
		out = append(out, p.Problem)
	}
	return out
}

func (l *loader) isConsequence(path string) bool {
	return slices.ContainsFunc(l.spoilt, func(s string) bool {
		return path == s || strings.HasSuffix(s, ".") && strings.HasPrefix(path, s)
	})
}

// object finds the cluster configuration in a document; nil after a problem.
func (l *loader) object(root *yaml.Node) *yaml.Node {
	if root.Kind != yaml.MappingNode {
		l.addAt(root.Line, Key, "missing; the document is %s, want an object with this key", describe(root))
		return nil
	}
	var found *yaml.Node
	bare, near := false, ""
	for i := 0; i+1 < len(root.Content); i += 2 {
		key := root.Content[i]
		switch {
		case key.Value == Key && found == nil:
			found = root.Content[i+1]
		case key.Value == Key:
			l.addAt(key.Line, Key, "given twice; keep one")
		case slices.Contains(networkKeys, key.Value):
			bare = true
		case nearest(key.Value, []string{Key}) != "":
			near = key.Value
		}
	}
	if found != nil {
		if found = l.unquoted(found); found == nil {
			return nil
		}
	}
	switch {
	case found != nil && found.Kind == yaml.MappingNode:
		return found
	case found != nil:
		l.addAt(found.Line, Key, "want an object with vtep_subnet, vtep_mac_oui and overlays, have %s", describe(found))
	case bare:
		return root
	case near != "":
		l.addAt(root.Line, Key, "missing; is %q meant to be it?", near)
	default:
		l.addAt(root.Line, Key, "missing; want this key, or its object alone with vtep_subnet, vtep_mac_oui and overlays")
	}
	return nil
}

func (l *loader) network(node *yaml.Node) conf.Network {
	var n conf.Network
	l.lines[""] = node.Line
	for key, value := range l.fields("", node, networkKeys) {
		switch key {
		case "vtep_subnet":
			if value.Kind != yaml.ScalarNode || value.ShortTag() != "!!str" || value.Value != "" { // we print "" where there is none
				n.VTEPSubnet = l.prefix(key, value)
			}
		case "vtep_subnet6":
			n.VTEPSubnet6 = l.prefix(key, value)
		case "vtep_mac_oui":
			n.VTEPMACOUI = l.text(key, value)
		case "vtep_mtu":
			n.VTEPMTU = l.number(key, value, 0, conf.MaxMTU)
		case "reclaim":
			n.Reclaim = l.text(key, value)
		case "overlays":
			n.Overlays = l.overlays(key, value)
		}
	}
	return n
}

func (l *loader) overlays(path string, node *yaml.Node) []conf.Overlay {
	if node.Kind != yaml.SequenceNode {
		l.wrongType(path, node, "a list of overlays, each beginning with a dash")
		return nil
	}
	var out []conf.Overlay
	for i, item := range node.Content {
		out = append(out, l.overlay(fmt.Sprintf("%s[%d]", path, i), item))
	}
	return out
}

func (l *loader) overlay(path string, node *yaml.Node) conf.Overlay {
	var o conf.Overlay
	l.lines[path] = node.Line
	if node.Kind != yaml.MappingNode {
		l.wrongType(path, node, "an object with name, subnet and prefix")
		l.spoilt = append(l.spoilt, path+".")
		return o
	}
	for key, value := range l.fields(path, node, overlayKeys) {
		at := join(path, key)
		switch key {
		case "name":
			o.Name = l.text(at, value)
		case "subnet":
			o.Subnet = l.prefix(at, value)
		case "subnet6":
			o.Subnet6 = l.prefix(at, value)
		case "prefix":
			o.Prefix = l.number(at, value, 1, 32)
		case "prefix6":
			o.Prefix6 = l.number(at, value, 1, 128)
		case "enabled":
			o.Enabled = l.boolean(at, value)
		case "isolation":
			o.Isolation = l.isolation(at, value)
		case "allow":
			o.Allow = l.names(at, value)
		case "blocks_per_agent":
			o.BlocksPerAgent = l.number(at, value, 1, conf.MaxBlocksPerAgent)
		case "antispoof":
			o.AntiSpoof = l.boolean(at, value)
		case "halves":
			o.Halves = l.text(at, value)
		}
	}
	return o
}

// isolation reads one of its modes, or true or false.
func (l *loader) isolation(path string, node *yaml.Node) conf.Isolation {
	if node.Kind == yaml.ScalarNode && node.ShortTag() == "!!bool" {
		return conf.IsolationOf(strings.EqualFold(node.Value, "true"))
	}
	if node.Kind != yaml.ScalarNode || node.ShortTag() != "!!str" {
		l.wrongType(path, node, "overlay, strict or none")
		return ""
	}
	i, err := conf.ParseIsolation(node.Value)
	if err != nil {
		l.unreadable(path, "%v", err)
	}
	return i
}

// names reads a list of names of overlays.
func (l *loader) names(path string, node *yaml.Node) (out []string) {
	if node.Kind != yaml.SequenceNode {
		l.wrongType(path, node, "a list of names of overlays")
		return nil
	}
	for i, item := range node.Content {
		at := fmt.Sprintf("%s[%d]", path, i)
		l.lines[at] = item.Line
		if name := l.text(at, item); name != "" {
			out = append(out, name)
		}
	}
	return out
}

// text reads a string.
func (l *loader) text(path string, node *yaml.Node) string {
	if node.Kind == yaml.ScalarNode && node.ShortTag() == "!!str" {
		return node.Value
	}
	want := "a string"
	if node.Kind == yaml.ScalarNode {
		want = fmt.Sprintf("a string, that is with quotes: %q", node.Value)
	}
	l.wrongType(path, node, want)
	return ""
}

// prefix reads an address range.
func (l *loader) prefix(path string, node *yaml.Node) netip.Prefix {
	const want = "an address range like 9.0.0.0/8 or fd01:b::/64"
	if node.Kind != yaml.ScalarNode || node.ShortTag() != "!!str" {
		l.wrongType(path, node, want)
		return netip.Prefix{}
	}
	p, err := netip.ParsePrefix(node.Value)
	if err != nil {
		_, why, _ := strings.Cut(err.Error(), "): ")
		l.unreadable(path, "%q is not %s: %s", node.Value, want, why)
		return netip.Prefix{}
	}
	return p
}

// number reads a decimal number.
func (l *loader) number(path string, node *yaml.Node, least, most int) int {
	if node.Kind != yaml.ScalarNode || node.ShortTag() != "!!int" {
		l.wrongType(path, node, "a number without quotes")
		return 0
	}
	n, err := strconv.Atoi(node.Value)
	switch {
	case err == nil && strconv.Itoa(n) != node.Value, err != nil && !allDigits(node.Value):
		l.unreadable(path, "%s can be read in more than one way; write a plain decimal number", node.Value)
	case err != nil || n < least || n > most:
		l.unreadable(path, "%s: want a number from %d to %d", node.Value, least, most)
	default:
		return n
	}
	return 0
}

func allDigits(s string) bool {
	return strings.Trim(strings.TrimPrefix(s, "-"), "0123456789") == ""
}

// boolean reads true or false.
func (l *loader) boolean(path string, node *yaml.Node) *bool {
	if node.Kind != yaml.ScalarNode || node.ShortTag() != "!!bool" {
		l.wrongType(path, node, "true or false, without quotes")
		return nil
	}
	b := strings.EqualFold(node.Value, "true")
	return &b
}

func (l *loader) wrongType(path string, node *yaml.Node, want string) {
	l.unreadable(path, "want %s, have %s", want, describe(node))
}

// unreadable records a problem of a value that is there.
func (l *loader) unreadable(path, format string, args ...any) {
	l.add(path, format, args...)
	l.spoil(path)
}

// spoil marks a value as given but not usable. An overlay whose only subnet is
// so must not be called one without a subnet.
func (l *loader) spoil(path string) {
	l.spoilt = append(l.spoilt, path)
	overlay, key, _ := strings.Cut(path, ".")
	if strings.HasPrefix(key, "subnet") || strings.HasPrefix(key, "prefix") {
		l.spoilt = append(l.spoilt, overlay)
	}
}
