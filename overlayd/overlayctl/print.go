package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"unicode"

	"overlayd.internal/overlay/conf"
)

// printJSON prints v indented.
func (e *env) printJSON(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stdout, "%s\n", b)
	return err
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

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
