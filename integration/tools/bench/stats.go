package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Row is one measured thing, in milliseconds unless the unit says otherwise.
type Row struct {
	Part string  `json:"part"`
	Name string  `json:"name"`
	Unit string  `json:"unit"`
	N    int     `json:"n"`
	P50  float64 `json:"p50"`
	P95  float64 `json:"p95"`
}

// Goal is a ratio of two rows of the same run, and what it should be.
type Goal struct {
	Part    string  `json:"part"`
	What    string  `json:"what"`
	Against string  `json:"against"`
	Ratio   float64 `json:"ratio"`
	Op      string  `json:"op"` // "<=" or ">="
	Limit   float64 `json:"limit"`
	OK      bool    `json:"ok"`
}

// Report collects what a run measured.
type Report struct {
	Machine string `json:"machine"`
	Rows    []Row  `json:"rows"`
	Goals   []Goal `json:"goals"`

	shown map[string]bool // parts that were printed
}

func (r *Report) add(part, name, unit string, samples []float64) Row {
	s := slices.Sorted(slices.Values(samples))
	row := Row{Part: part, Name: name, Unit: unit, N: len(s)}
	if len(s) > 0 {
		row.P50, row.P95 = quantile(s, 0.50), quantile(s, 0.95)
	}
	r.Rows = append(r.Rows, row)
	return row
}

// quantile of sorted samples, nearest rank.
func quantile(s []float64, q float64) float64 { return s[int(q*float64(len(s)-1)+0.5)] }

func (r *Report) goal(part, what, against string, ratio float64, op string, limit float64) {
	ok := ratio <= limit
	if op == ">=" {
		ok = ratio >= limit
	}
	r.Goals = append(r.Goals, Goal{part, what, against, ratio, op, limit, ok})
}

// ratio adds a goal on the medians of two rows of a part. It says nothing when
// one of the two was not measured.
func (r *Report) ratio(part, what, against, op string, limit float64) {
	a, okA := r.find(part, what)
	b, okB := r.find(part, against)
	if okA && okB && b.P50 > 0 {
		r.goal(part, what, against, a.P50/b.P50, op, limit)
	}
}

func (r *Report) find(part, name string) (Row, bool) {
	for _, row := range r.Rows {
		if row.Part == part && row.Name == name {
			return row, row.N > 0
		}
	}
	return Row{}, false
}

// print writes the rows and goals of one part, once.
func (r *Report) print(w io.Writer, part string) {
	if r.shown[part] {
		return
	}
	if r.shown == nil {
		r.shown = map[string]bool{}
	}
	r.shown[part] = true
	fmt.Fprintf(w, "\n%s\n", part)
	for _, row := range r.Rows {
		if row.Part == part {
			fmt.Fprintf(w, "  %-52s n=%-4d p50 %9.3f  p95 %9.3f %s\n", row.Name, row.N, row.P50, row.P95, row.Unit)
		}
	}
	for _, g := range r.Goals {
		if g.Part != part {
			continue
		}
		verdict := "ok"
		if !g.OK {
			verdict = "MISSED"
		}
		what := g.What
		if g.Against != "" {
			what += " / " + g.Against
		}
		fmt.Fprintf(w, "  %-84s %7.3f %s %g %s\n", what, g.Ratio, g.Op, g.Limit, verdict)
	}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func indent(s string) string {
	return "    " + strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n    ")
}
