package clusterfile

import (
	"fmt"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"overlayd.internal/overlay/conf"
)

// Keys of a DC/OS config.yaml beside dcos_overlay_network that are about the
// overlay. Their values are strings there; plain ones are taken, too.
const (
	mtuKey    = "dcos_overlay_mtu"
	enableKey = "dcos_overlay_enable"
)

// beside applies the settings that stand beside the cluster configuration.
func (l *loader) beside(root *yaml.Node, n *conf.Network) {
	seen := map[string]bool{}
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, value := root.Content[i], root.Content[i+1]
		if key.Value != mtuKey && key.Value != enableKey || isNull(value) {
			continue
		}
		if seen[key.Value] {
			l.addAt(key.Line, key.Value, "given twice; keep one")
			continue
		}
		seen[key.Value] = true
		l.lines[key.Value] = value.Line
		if key.Value == mtuKey {
			l.mtu(value, n)
		} else {
			l.enable(value, n)
		}
	}
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

func (l *loader) mtu(value *yaml.Node, n *conf.Network) {
	mtu, err := strconv.Atoi(strings.TrimSpace(value.Value))
	switch {
	case value.Kind != yaml.ScalarNode:
		l.wrongType(mtuKey, value, "a number")
	case err != nil || strconv.Itoa(mtu) != strings.TrimSpace(value.Value) || mtu < 1 || mtu > conf.MaxMTU:
		l.unreadable(mtuKey, "%q: want a number from 1 to %d", value.Value, conf.MaxMTU)
	case n.VTEPMTU != 0 && n.VTEPMTU != mtu:
		l.add(mtuKey, "%d, but vtep_mtu is %d; keep one of them", mtu, n.VTEPMTU)
	default:
		if n.VTEPMTU == 0 {
			l.lines["vtep_mtu"] = value.Line // where Validate finds it wrong
		}
		n.VTEPMTU = mtu
		l.notes = append(l.notes, fmt.Sprintf("%s: %d is the MTU of the overlays on every host.", mtuKey, mtu))
	}
}

func (l *loader) enable(value *yaml.Node, n *conf.Network) {
	switch text := strings.ToLower(strings.TrimSpace(value.Value)); {
	case value.Kind == yaml.ScalarNode && text == "true":
	case value.Kind == yaml.ScalarNode && text == "false":
		for i := range n.Overlays {
			off := false
			n.Overlays[i].Enabled = &off
		}
		l.notes = append(l.notes, enableKey+": false disables every overlay: no host gets a new lease of one.")
	default:
		l.unreadable(enableKey, "want true or false, have %s", describe(value))
	}
}

// unquoted reads a cluster configuration that is the text of a string, which is
// how DC/OS passes it on. Anything else it returns as it is; nil after a
// problem.
func (l *loader) unquoted(node *yaml.Node) *yaml.Node {
	if node.Kind != yaml.ScalarNode || node.ShortTag() != "!!str" || !strings.ContainsAny(node.Value, "{:") {
		return node
	}
	inner, err := document(strings.NewReader(node.Value))
	if err != nil {
		l.addAt(node.Line, Key, "is a string that does not hold the configuration: %v", err)
		return nil
	}
	// The lines of a block are those of the file; of other strings there is one.
	shift := func(int) int { return node.Line }
	if node.Style&yaml.LiteralStyle != 0 {
		shift = func(line int) int { return node.Line + line }
	}
	var place func(*yaml.Node)
	place = func(n *yaml.Node) {
		n.Line = shift(n.Line)
		for _, child := range n.Content {
			place(child)
		}
	}
	place(inner)
	if inner.Kind == yaml.MappingNode && len(inner.Content) == 2 && inner.Content[0].Value == Key {
		return inner.Content[1] // with its key
	}
	return inner
}
