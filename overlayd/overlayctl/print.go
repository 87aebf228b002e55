package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"
	"unicode"

	"go.yaml.in/yaml/v3"

	"overlayd.internal/overlay/conf"
)

// What -o can be.
const (
	outputTable = "table"
	outputWide  = "wide"
	outputJSON  = "json"
	outputYAML  = "yaml"
)

var outputs = []string{outputTable, outputWide, outputJSON, outputYAML}

// structured reports whether programs read the output.
func (e *env) structured() bool { return e.output == outputJSON || e.output == outputYAML }

// print prints v as JSON or YAML, with the same keys in the same order.
func (e *env) print(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err == nil && e.output == outputYAML {
		b, err = toYAML(b)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stdout, "%s\n", bytes.TrimRight(b, "\n"))
	return err
}

// printLine prints v as JSON in one line, for programs that read a stream.
func (e *env) printLine(v any) error { return json.NewEncoder(e.stdout).Encode(v) }

// toYAML keeps the order of the keys, which decoding into a map would lose. JSON
// is YAML, in another style.
func toYAML(b []byte) ([]byte, error) {
	var root yaml.Node
	if err := yaml.Unmarshal(b, &root); err != nil {
		return nil, err
	}
	blockStyle(&root)
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	if err := enc.Encode(&root); err != nil {
		return nil, err
	}
	return out.Bytes(), enc.Close()
}

func blockStyle(n *yaml.Node) {
	if len(n.Content) > 0 || n.Kind == yaml.ScalarNode {
		n.Style = 0
	}
	for _, c := range n.Content {
		blockStyle(c)
	}
}

// printTable prints a line of titles and the rows, in columns. What others have
// put into a cell cannot break the table or the terminal.
func (e *env) printTable(titles []string, rows [][]string) error {
	w := newTable(e.stdout)
	fmt.Fprintln(w, strings.Join(titles, "\t"))
	for _, row := range rows {
		for i, cell := range row {
			row[i] = printable(cell)
		}
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	return w.Flush()
}

func printable(s string) string {
	if s == "" {
		return "-"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}

// prefixes prints those that are there.
func prefixes(ps ...netip.Prefix) string {
	var out []string
	for _, p := range ps {
		if p.IsValid() {
			out = append(out, p.String())
		}
	}
	return strings.Join(out, " ")
}

// blockTexts prints agent subnets, the first block before the further ones.
func blockTexts(blocks []conf.Block) string {
	var all []netip.Prefix
	for _, b := range blocks {
		all = append(all, b.Prefixes()...)
	}
	return prefixes(all...)
}

// statusText prints a status in few words.
func statusText(s *conf.OverlayStatus) string {
	if s == nil {
		return ""
	}
	text := strings.ToLower(strings.TrimPrefix(string(s.Status), "STATUS_"))
	if s.Error != "" {
		text += ": " + s.Error
	}
	return text
}

func halves(hs []conf.Half) string {
	var out []string
	for _, h := range hs {
		out = append(out, string(h))
	}
	return strings.Join(out, ",")
}

func newTable(w io.Writer) *tabwriter.Writer { return tabwriter.NewWriter(w, 0, 8, 2, ' ', 0) }
