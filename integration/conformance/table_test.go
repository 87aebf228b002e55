package conformance

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// line is one line of the list. For a program it does not apply to there is a
// reason instead of a test.
type line struct {
	id    string
	level string // M: the specification's must, S: its should, C: its conventions, X: beyond it
	what  string
	run   func(r *rig)
	not   map[string]string // by program, or "" for all
	note  string
	// slow lines wait for time limits. They run at the same time, each program with
	// address stores of its own.
	slow bool
}

// Reasons that recur.
const (
	noLinks    = "makes no interface"
	noDelegate = "runs no other plugin"
	mainPlugin = "is a main plugin"
)

// links are the reasons of lines that are about interfaces.
func ipamDoesNot(reason string) map[string]string { return map[string]string{"overlay-ipam": reason} }

var onlyIPAM = map[string]string{"m-overlay": mainPlugin, "d-overlay": mainPlugin}

func (l line) reason(p program) string {
	if r := l.not[""]; r != "" {
		return r
	}
	return l.not[p.name]
}

func lines() []line {
	var all []line
	for _, part := range [][]line{protocolLines, versionLines, addLines, delLines, checkLines, statusLines, gcLines, ipamLines, delegationLines, resultLines, runtimeLines} {
		all = append(all, part...)
	}
	return all
}

// TestConformance runs the list.
func TestConformance(t *testing.T) {
	h := newHost(t)
	all := lines()
	results := map[string]map[string]string{}
	for _, l := range all {
		results[l.id] = map[string]string{}
	}
	one := func(t *testing.T, l line, p program) {
		r := newRig(t, h, p)
		if l.slow {
			r.parallel = true
			r.forge(nil) // so that only it waits for its locks
		}
		l.run(r)
	}
	ran := true
	for _, l := range all {
		t.Run(l.id, func(t *testing.T) {
			for _, p := range programs {
				if l.reason(p) != "" {
					results[l.id][p.name] = "-"
					continue
				}
				if l.slow {
					continue
				}
				ok := t.Run(p.name, func(t *testing.T) { one(t, l, p) })
				results[l.id][p.name] = verdict(ok)
			}
		})
	}
	// Programs have to keep to their time limits without agent and coordinator.
	resume := h.stopAgent(t)
	h.coordinator.Kill()
	verdicts := make([]map[string]bool, len(programs))
	t.Run("slow", func(t *testing.T) {
		for i, p := range programs {
			verdicts[i] = map[string]bool{}
			t.Run(p.name, func(t *testing.T) {
				t.Parallel()
				for _, l := range all {
					if l.slow && l.reason(p) == "" {
						verdicts[i][l.id] = t.Run(l.id, func(t *testing.T) { one(t, l, p) })
					}
				}
			})
		}
	})
	must(t, h.coordinator.Restart(t.Context()))
	resume()
	if d := h.check(t); d != "" {
		t.Errorf("overlayctl ipam check:\n%s", d)
	}
	for i, p := range programs {
		for id, ok := range verdicts[i] {
			results[id][p.name] = verdict(ok)
		}
	}
	for _, l := range all { // with -run only some did
		for _, p := range programs {
			ran = ran && results[l.id][p.name] != ""
		}
	}
	if !ran || strings.Contains(flagValue("test.run"), "/") {
		return
	}
	t.Logf("\n%s", table(all, results))
	if t.Failed() {
		return // the document is about what passes
	}
	doc := document(all, results)
	if *docFile != "" {
		must(t, os.WriteFile(*docFile, doc, 0o644))
		return
	}
	have, err := os.ReadFile(filepath.Join(top, "docs", "conformance.md"))
	if err != nil || !bytes.Equal(have, doc) {
		t.Errorf("docs/conformance.md is not what this run says (%v); run make conformance", err)
	}
}

func verdict(ok bool) string {
	if ok {
		return "pass"
	}
	return "FAIL"
}

// TestList: every line once, with a level, a test or a reason.
func TestList(t *testing.T) {
	want := map[string]int{"P": 27, "V": 7, "A": 23, "D": 19, "K": 9, "S": 6, "G": 10, "I": 5, "L": 6, "R": 10, "Z": 7}
	seen := map[string]bool{}
	for _, l := range lines() {
		if seen[l.id] {
			t.Errorf("%s is there twice", l.id)
		}
		seen[l.id] = true
		if l.what == "" || strings.Trim(l.level, "MSCX/") != "" || l.level == "" {
			t.Errorf("%s has no level or no text", l.id)
		}
		if l.run == nil && l.not[""] == "" {
			t.Errorf("%s has neither test nor reason", l.id)
		}
	}
	for letter, n := range want {
		for i := 1; i <= n; i++ {
			if id := fmt.Sprintf("%s%02d", letter, i); !seen[id] {
				t.Errorf("%s is missing", id)
			}
			delete(seen, fmt.Sprintf("%s%02d", letter, i))
		}
	}
	for id := range seen {
		t.Errorf("%s is not in the list", id)
	}
}

// table is the result for a terminal: every line or, if some failed, those.
func table(all []line, results map[string]map[string]string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-4s %-5s %-10s %-10s %-13s %s\n", "ID", "LEVEL", "m-overlay", "d-overlay", "overlay-ipam", "WHAT")
	counts := map[string]int{}
	for _, l := range all {
		for _, p := range programs {
			counts[results[l.id][p.name]]++
		}
	}
	for _, l := range all {
		of := results[l.id]
		if counts["FAIL"] > 0 && !slices.Contains(slices.Collect(maps.Values(of)), "FAIL") {
			continue
		}
		fmt.Fprintf(&b, "%-4s %-5s", l.id, l.level)
		for i, p := range programs {
			fmt.Fprintf(&b, " %-*s", []int{10, 10, 13}[i], of[p.name])
		}
		fmt.Fprintf(&b, " %s\n", l.what)
	}
	fmt.Fprintf(&b, "%d lines: %d passed, %d failed, %d do not apply\n", len(all), counts["pass"], counts["FAIL"], counts["-"])
	return b.String()
}

// document is docs/conformance.md: text that is the same for the same results.
func document(all []line, results map[string]map[string]string) []byte {
	var b bytes.Buffer
	b.WriteString(`# Conformance

Written by ` + "`make conformance`" + `, which runs every line against the real programs. Do not edit.

Level: **M** the CNI specification's must, **S** its should, **C** its conventions, **X** beyond the
specification, because a real runtime or a real bug needs it. A dash means that the line does not
apply; the reason is in the last column.

| id | level | what | m-overlay | d-overlay | overlay-ipam | note |
|---|---|---|---|---|---|---|
`)
	for _, l := range all {
		fmt.Fprintf(&b, "| %s | %s | %s |", l.id, l.level, l.what)
		for _, p := range programs {
			fmt.Fprintf(&b, " %s |", results[l.id][p.name])
		}
		notes := []string{}
		for _, p := range append([]program{{name: ""}}, programs...) {
			reason := l.not[p.name]
			if reason != "" && p.name != "" {
				reason = p.name + " " + reason
			}
			if reason != "" && !(strings.HasPrefix(p.name, "d-") && l.not["m-overlay"] == l.not[p.name]) {
				notes = append(notes, reason)
			}
		}
		if l.note != "" {
			notes = append(notes, l.note)
		}
		fmt.Fprintf(&b, " %s |\n", strings.Join(notes, "; "))
	}
	b.WriteString("\n## Error codes\n\n| code | meaning |\n|---|---|\n")
	for _, c := range codes {
		fmt.Fprintf(&b, "| %d | %s |\n", c.code, c.what)
	}
	return b.Bytes()
}
