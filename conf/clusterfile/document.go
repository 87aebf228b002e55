package clusterfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// maxSize bounds a configuration file; 2,000 overlays fit.
const maxSize = 256 << 10

// errEmpty: there is no document, or nothing in it.
var errEmpty = errors.New("the file is empty")

// document reads the one YAML document of a file and returns its root.
func document(r io.Reader) (*yaml.Node, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxSize+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxSize {
		return nil, fmt.Errorf("larger than %d KiB; is it the right file?", maxSize>>10)
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	if !utf8.Valid(data) {
		return nil, errors.New("not UTF-8 text; save the file as UTF-8")
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var first, second yaml.Node
	switch err := dec.Decode(&first); {
	case errors.Is(err, io.EOF):
		return nil, errEmpty
	case err != nil:
		return nil, syntaxError(err, data)
	}
	switch err := dec.Decode(&second); {
	case err == nil:
		return nil, fmt.Errorf("line %d: a second YAML document begins; keep one", second.Line)
	case !errors.Is(err, io.EOF):
		return nil, syntaxError(err, data)
	}
	return first.Content[0], nil
}

// syntaxError words the parser's error and adds what it does not say: that the
// strange character is a tab.
func syntaxError(err error, data []byte) error {
	for i, line := range strings.Split(string(data), "\n") {
		if strings.HasPrefix(strings.TrimLeft(line, " "), "\t") {
			return fmt.Errorf("not YAML: line %d is indented with a tab; use spaces", i+1)
		}
	}
	return fmt.Errorf("not YAML: %s", strings.TrimPrefix(err.Error(), "yaml: "))
}

// fields yields the known keys of an object with their values, and reports the
// others. A key without a value counts as not given.
func (l *loader) fields(path string, node *yaml.Node, known []string) iter.Seq2[string, *yaml.Node] {
	return func(yield func(string, *yaml.Node) bool) {
		seen := map[string]int{}
		for i := 0; i+1 < len(node.Content); i += 2 {
			key, value := node.Content[i], node.Content[i+1]
			name := key.Value
			at := join(path, name)
			switch {
			case key.Kind != yaml.ScalarNode || key.ShortTag() == "!!merge":
				l.addAt(key.Line, path, "%s cannot be a key here; write every key out", describe(key))
			case !slices.Contains(known, name):
				l.unknown(key.Line, path, name, known)
			case seen[name] > 0:
				l.addAt(key.Line, at, "given twice, first on line %d; keep one", seen[name])
			case value.Kind == yaml.ScalarNode && value.ShortTag() == "!!null":
				seen[name] = key.Line
			default:
				seen[name] = key.Line
				l.lines[at] = key.Line
				if !yield(name, value) {
					return
				}
			}
		}
	}
}

// unknown reports a key that is not known, with the one probably meant. That
// one is then not reported as missing.
func (l *loader) unknown(line int, path, name string, known []string) {
	if near := nearest(name, known); near != "" {
		l.addAt(line, join(path, name), "unknown key; did you mean %q?", near)
		l.spoil(join(path, near))
		return
	}
	l.addAt(line, join(path, name), "unknown key; the keys are %s", strings.Join(known, ", "))
}

// describe says what a node is, for "have ...".
func describe(node *yaml.Node) string {
	switch node.Kind {
	case yaml.MappingNode:
		return "an object"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return fmt.Sprintf("the alias *%s (aliases are not followed; write the value out)", node.Value)
	}
	switch tag := node.ShortTag(); tag {
	case "!!null":
		return "nothing"
	case "!!str":
		return fmt.Sprintf("the string %q", node.Value)
	case "!!int", "!!float":
		return "the number " + node.Value
	case "!!bool", "!!merge", "!!timestamp":
		return node.Value
	default:
		return fmt.Sprintf("a value with the tag %s", tag)
	}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// nearest returns the known word that s is probably a misspelling of, or most
// of, or "".
func nearest(s string, known []string) string {
	best, least := "", 1+len(s)/4
	for _, k := range known {
		if strings.HasPrefix(k, s) && len(s) > len(k)/2 {
			return k
		}
		if d := distance(strings.ToLower(s), k); d <= least {
			best, least = k, d-1
		}
	}
	return best
}

// distance is the number of characters to insert, delete or replace to get
// from a to b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(diagonal+cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
