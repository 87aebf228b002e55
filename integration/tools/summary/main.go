// Command summary reads what `go test -json` prints and makes it readable: one
// line per package, the whole output of every test that failed, and at the end
// the count of tests that passed, failed and were skipped, with what the failed
// said first and why the others were skipped.
//
// It exits 1 when a test or a build failed, and, where nothing may be skipped
// (CI=true and root), when a test was skipped.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// event is one line of `go test -json`; see `go doc test2json`.
type event struct {
	Action     string
	Package    string
	ImportPath string // of build-output and build-fail
	Test       string
	Output     string
}

func main() {
	strict := os.Getenv("CI") == "true" && os.Geteuid() == 0
	ok, err := summarise(os.Stdin, os.Stdout, strict)
	if err != nil {
		fmt.Fprintln(os.Stderr, "summary:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

type summary struct {
	out     io.Writer
	output  map[string][]string // by package and test: what it printed so far
	passed  int
	failed  []string
	skipped []string
}

// summarise copies what deserves a look from in to out. It reports whether
// everything is fine; with strict, a skipped test is not.
func summarise(in io.Reader, out io.Writer, strict bool) (bool, error) {
	s := &summary{out: out, output: map[string][]string{}}
	r := bufio.NewReader(in)
	for {
		line, err := r.ReadString('\n')
		if line != "" {
			s.line(line)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return false, err
		}
	}
	if s.passed+len(s.failed)+len(s.skipped) == 0 {
		return false, fmt.Errorf("no test ran")
	}

	fmt.Fprintf(out, "\n%d passed, %d failed, %d skipped\n", s.passed, len(s.failed), len(s.skipped))
	for _, f := range s.failed {
		fmt.Fprintln(out, "  failed:", f)
	}
	for _, f := range s.skipped {
		fmt.Fprintln(out, "  skipped:", f)
	}
	if strict && len(s.skipped) > 0 {
		fmt.Fprintln(out, "nothing may be skipped here (CI=true and root)")
		return false, nil
	}
	return len(s.failed) == 0, nil
}

func (s *summary) line(line string) {
	var e event
	if json.Unmarshal([]byte(line), &e) != nil {
		fmt.Fprint(s.out, line) // not of test2json: go itself says something
		return
	}
	if e.Test == "" {
		s.packageEvent(e)
		return
	}
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output":
		s.output[key] = append(s.output[key], e.Output)
		return
	case "pass":
		s.passed++
	case "fail":
		s.failed = append(s.failed, key+complaint(s.output[key]))
		fmt.Fprint(s.out, strings.Join(s.output[key], ""))
	case "skip":
		s.skipped = append(s.skipped, key+": "+reason(s.output[key]))
	default:
		return
	}
	delete(s.output, key)
}

// packageEvent handles what concerns a whole package or a build. The output of
// a package that failed is printed, such as a panic that no test owns; of one
// that passed, only its last line ("ok ...").
func (s *summary) packageEvent(e event) {
	switch e.Action {
	case "build-output":
		fmt.Fprint(s.out, e.Output)
	case "build-fail":
		s.failed = append(s.failed, e.ImportPath+": does not build")
	case "output":
		s.output[e.Package] = append(s.output[e.Package], e.Output)
	case "fail":
		// A test that was running when its package died never got an event of its own.
		for key, lines := range s.output {
			if strings.HasPrefix(key, e.Package+" ") && len(lines) > 0 {
				s.failed = append(s.failed, key+": did not end")
				fmt.Fprint(s.out, strings.Join(lines, ""))
				delete(s.output, key)
			}
		}
		fmt.Fprint(s.out, strings.Join(s.output[e.Package], ""))
		if !slices.ContainsFunc(s.failed, func(f string) bool { return strings.HasPrefix(f, e.Package) }) {
			s.failed = append(s.failed, e.Package)
		}
	case "pass", "skip":
		if lines := s.output[e.Package]; len(lines) > 0 && !strings.Contains(lines[len(lines)-1], "[no test files]") {
			fmt.Fprint(s.out, lines[len(lines)-1])
		}
	}
}

// complaint is the first line that a test gave t.Error or t.Log, with its file
// and line number; "" if there is none, as with one whose subtests failed.
func complaint(output []string) string {
	for _, l := range output {
		if strings.Contains(l, ".go:") {
			return ": " + strings.TrimSpace(l)
		}
	}
	return ""
}

// reason is what a test gave t.Skip: the line before its "--- SKIP", less the
// file and line number.
func reason(output []string) string {
	for _, l := range slices.Backward(output) {
		l = strings.TrimSpace(l)
		if l == "" || strings.HasPrefix(l, "---") || strings.HasPrefix(l, "===") {
			continue
		}
		if _, after, ok := strings.Cut(l, ".go:"); ok {
			if _, text, ok := strings.Cut(after, ": "); ok {
				return text
			}
		}
		return l
	}
	return "no reason given"
}
