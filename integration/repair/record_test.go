package repair

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

var (
	keptFile = flag.String("kept", "", "keep what is measured in this file, and go on where an earlier run of the same build ended; with -full")
	part     = flag.Duration("part", 0, "begin nothing more after that long; with -kept")
	times    = flag.Int("times", 3, "how often a firewalld works on a host; with -full")
)

// record is what was measured so far. On disk it lets a machine that others use as
// well measure in parts.
type record struct {
	Build    string                        // a digest of the programs that were measured
	Faults   map[string]map[string]outcome // by firewall and fault
	Programs map[string][][]result         // by the name of a program's test: of each time, its events

	file  string
	until time.Time // zero: no end
}

// openRecord reads what an earlier run of the same build left behind.
func openRecord(t *testing.T) *record {
	t.Helper()
	r := &record{file: *keptFile}
	if r.file != "" {
		b, err := os.ReadFile(r.file)
		if err == nil {
			err = json.Unmarshal(b, r)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if *part > 0 {
		r.until = time.Now().Add(*part)
	}
	if build := digest(t); r.Build != build {
		if r.Build != "" {
			t.Fatalf("%s is of another build; remove it to begin anew", r.file)
		}
		r.Build, r.Faults, r.Programs = build, map[string]map[string]outcome{}, map[string][][]result{}
	}
	return r
}

// digest is one of the programs that are measured.
func digest(t *testing.T) string {
	t.Helper()
	if binDir == "" {
		return "none"
	}
	files, err := filepath.Glob(filepath.Join(binDir, "*"))
	must(t, err)
	h := sha256.New()
	for _, f := range files {
		b, err := os.ReadFile(f)
		must(t, err)
		fmt.Fprintf(h, "%s %d %s", filepath.Base(f), len(b), b)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// over reports whether nothing more is to be begun.
func (r *record) over() bool { return !r.until.IsZero() && time.Now().After(r.until) }

// keep writes what there is.
func (r *record) keep(t *testing.T) {
	t.Helper()
	if r.file == "" {
		return
	}
	b, err := json.MarshalIndent(r, "", "\t")
	must(t, err)
	must(t, os.WriteFile(r.file, b, 0o644))
}

// left are the faults that are still to be measured with a firewall.
func (r *record) left(firewall string) (out []fault) {
	for _, f := range faults {
		_, there := r.Faults[firewall][f.name]
		// The short run leaves to the second firewall what is about rules.
		if f.isFor(firewall) && !there && (*full || f.quick && f.within == 0 && (f.only != "" || firewall == firewalls[0])) {
			out = append(out, f)
		}
	}
	return out
}

// whole reports whether nothing is left to be measured.
func (r *record) whole() bool {
	for _, firewall := range firewalls {
		if len(r.left(firewall)) > 0 {
			return false
		}
	}
	return !slices.ContainsFunc(trials(), func(x trial) bool { return len(r.Programs[x.name()]) < x.times })
}

// spread is what a program's event came to: medians, and the least and the most.
type spread struct {
	result
	least, most time.Duration
	times       int
}

// events are what programs did, in the order of the page.
func (r *record) events() (out []spread) {
	for _, x := range trials() {
		rounds := r.Programs[x.name()]
		for i := 0; len(rounds) > 0 && i < len(rounds[0]); i++ {
			var outages []time.Duration
			var lost [3][]int
			for _, round := range rounds {
				outages = append(outages, round[i].Outage)
				for k := range lost {
					lost[k] = append(lost[k], round[i].Lost[k])
				}
			}
			slices.Sort(outages)
			s := spread{result: rounds[0][i], least: outages[0], most: outages[len(outages)-1], times: len(rounds)}
			s.Outage = outages[len(outages)/2]
			for k := range lost {
				slices.Sort(lost[k])
				s.Lost[k] = lost[k][len(lost[k])/2]
			}
			out = append(out, s)
		}
	}
	return out
}

// longest is the outage for the page.
func (s spread) longest() string {
	if s.times == 1 {
		return s.Outage.String()
	}
	return fmt.Sprintf("%v (%v to %v, n = %d)", s.Outage, s.least, s.most, s.times)
}
