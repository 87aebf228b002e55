package main

import (
	"fmt"
	"io"
	"slices"
)

// Row is one measured thing.
type Row struct {
	Part string  `json:"part"`
	Name string  `json:"name"`
	Unit string  `json:"unit"`
	N    int     `json:"n"`
	P50  float64 `json:"p50"`
	P95  float64 `json:"p95"`
	P99  float64 `json:"p99"`
	Max  float64 `json:"max"`
}

// Goal is a measured thing and what it should be.
type Goal struct {
	Part  string  `json:"part"`
	What  string  `json:"what"`
	Ratio float64 `json:"ratio"` // the value; named as in the benchmark's report
	Op    string  `json:"op"`
	Limit float64 `json:"limit"`
	OK    bool    `json:"ok"`
}

// Report collects what a simulation measured.
type Report struct {
	Rows  []Row  `json:"rows"`
	Goals []Goal `json:"goals"`

	part string // of what is added next
}

func (r *Report) add(name, unit string, samples ...float64) Row {
	s := slices.Sorted(slices.Values(samples))
	row := Row{Part: r.part, Name: name, Unit: unit, N: len(s)}
	if len(s) > 0 {
		row.P50, row.P95, row.P99, row.Max = quantile(s, 0.50), quantile(s, 0.95), quantile(s, 0.99), s[len(s)-1]
	}
	r.Rows = append(r.Rows, row)
	return row
}

// quantile of sorted samples, nearest rank.
func quantile(s []float64, q float64) float64 { return s[int(q*float64(len(s)-1)+0.5)] }

// atMost adds a goal.
func (r *Report) atMost(what string, value, limit float64) {
	r.Goals = append(r.Goals, Goal{r.part, what, value, "<=", limit, value <= limit})
}

func (r *Report) missed() int {
	n := 0
	for _, g := range r.Goals {
		if !g.OK {
			n++
		}
	}
	return n
}

func (r *Report) print(w io.Writer) {
	part := ""
	for _, row := range r.Rows {
		if row.Part != part {
			part = row.Part
			fmt.Fprintf(w, "\n%s\n", part)
		}
		if row.N == 1 {
			fmt.Fprintf(w, "  %-62s %12.3f %s\n", row.Name, row.P50, row.Unit)
		} else {
			fmt.Fprintf(w, "  %-62s p50 %.3f  p99 %.3f  longest %.3f %s (n=%d)\n", row.Name, row.P50, row.P99, row.Max, row.Unit, row.N)
		}
	}
	fmt.Fprintln(w, "\ngoals")
	for _, g := range r.Goals {
		verdict := "ok"
		if !g.OK {
			verdict = "MISSED"
		}
		fmt.Fprintf(w, "  %-62s %12.3f %s %g %s\n", g.What, g.Ratio, g.Op, g.Limit, verdict)
	}
	fmt.Fprintf(w, "\nsim: %d goals, %d missed\n", len(r.Goals), r.missed())
}
