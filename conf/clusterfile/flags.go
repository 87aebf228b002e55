package clusterfile

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"go.yaml.in/yaml/v3"

	"overlayd.internal/overlay/conf"
)

// LoadFlags reads a configuration file whose keys are names of flags without
// the dashes. A value is a scalar or a list of scalars, returned as written.
// Like Load it returns everything that is wrong, and the values are good for
// use only if that is nothing. A file in which everything is commented out sets
// nothing.
func LoadFlags(path string, known []string) (map[string][]string, []conf.Problem, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read the configuration: %w", err)
	}
	defer f.Close()
	root, err := document(f)
	if errors.Is(err, errEmpty) {
		return nil, nil, nil
	} else if err != nil {
		return nil, nil, fmt.Errorf("read the configuration %s: %w", path, err)
	}
	if root.Kind != yaml.MappingNode {
		return nil, nil, fmt.Errorf("read the configuration %s: want lines of the form flag: value, have %s", path, describe(root))
	}
	l := loader{lines: map[string]int{}}
	values := map[string][]string{}
	for key, node := range l.fields("", root, known) {
		items := []*yaml.Node{node}
		if node.Kind == yaml.SequenceNode {
			items = node.Content
		}
		if slices.ContainsFunc(items, func(n *yaml.Node) bool { return n.Kind != yaml.ScalarNode }) {
			l.wrongType(key, node, "a value or a list of values")
			continue
		}
		values[key] = []string{}
		for _, item := range items {
			values[key] = append(values[key], item.Value)
		}
	}
	return values, l.sorted(), nil
}
