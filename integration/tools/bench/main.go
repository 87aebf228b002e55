// Command bench measures the programs of this project against their peers, in
// one run, interleaved. Absolute times mean nothing on a shared machine; every
// goal is a ratio of medians, except the few that users count in seconds.
//
//	bench [-bin DIR] [-base DIR] [-silent DIR] [-peers DIR] [-rounds N] [-rows LIST] [-ways LIST] [-json FILE] [PART ...]
//
// Parts: attach calls burst ipam converge storm reports steady dataplane crowd scale idle fastpath reach. Without
// one it runs all. With -base the programs of another build are measured beside ours in
// attach, burst, ipam, converge, storm, dataplane and crowd. It exits 1 when a goal is missed, so that a check can rely on it.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// config is what every part gets.
type config struct {
	bin    string // our programs
	base   string // those of another build, to compare with; empty: none
	silent string // m-overlay built without the log and the counters of calls
	peers  string // reference plugins built from the module proxy
	debian string // Debian's reference plugins
	rounds int
	lab    *lab.Lab
	report *Report
	mounts []string
	hosts  int // cold starts so far
	only   only
}

var parts = []struct {
	name string
	run  func(context.Context, *config) error
}{
	{"attach", attach}, {"calls", recording}, {"burst", burst}, {"ipam", ipam}, {"converge", converge},
	{"storm", storm}, {"reports", reports}, {"steady", steady}, {"dataplane", dataplane}, {"crowd", crowd}, {"scale", scale}, {"idle", idle}, {"fastpath", fastpath}, {"reach", reach},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	code, err := run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
	os.Exit(code)
}

func run(ctx context.Context) (int, error) {
	c := &config{report: &Report{}}
	jsonFile := flag.String("json", "", "write the report to this file too")
	flag.StringVar(&c.bin, "bin", "bin", "directory of the programs to measure")
	flag.StringVar(&c.base, "base", "", "directory of another build to compare with")
	flag.StringVar(&c.silent, "silent", "bin/tools/silent", "directory of an m-overlay that was built with -tags nocalls")
	flag.StringVar(&c.peers, "peers", "bin/tools/engines/plugins", "directory of the reference plugins")
	flag.StringVar(&c.debian, "debian", "/usr/lib/cni", "directory of Debian's reference plugins")
	flag.IntVar(&c.rounds, "rounds", 30, "how often each thing is measured")
	flag.StringVar(&c.only.rows, "rows", "", "fastpath: only rows whose names begin so: tcp4,udp6,latency,rules,streams,applications,attach,offload")
	flag.StringVar(&c.only.ways, "ways", "", "fastpath: only these: fast,underlay,kernel,VXLAN,direct,host-gw,raw")
	pongAt := flag.String("pong", "", "internal: answer datagrams at this address")
	pingTo := flag.String("ping", "", "internal: exchange datagrams with this address")
	flag.Parse()
	switch {
	case *pongAt != "":
		return 1, pong(*pongAt) // ends only by an error
	case *pingTo != "":
		if err := ping(*pingTo); err != nil {
			return 1, err
		}
		return 0, nil
	}
	wanted := flag.Args()
	for _, w := range wanted {
		if !slices.ContainsFunc(parts, func(p struct {
			name string
			run  func(context.Context, *config) error
		}) bool {
			return p.name == w
		}) {
			return 2, fmt.Errorf("no part %q; there are attach, calls, burst, ipam, converge, storm, reports, steady, dataplane, crowd, scale, idle, fastpath and reach", w)
		}
	}
	for _, dir := range []*string{&c.bin, &c.base, &c.silent, &c.peers, &c.debian} {
		if *dir == "" {
			continue
		}
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return 1, err
		}
		*dir = abs
	}
	c.report.Machine = machine()
	fmt.Println(c.report.Machine)

	for _, p := range parts {
		if len(wanted) > 0 && !slices.Contains(wanted, p.name) {
			continue
		}
		if err := part(ctx, c, p.name, p.run); err != nil {
			return 1, err
		}
	}
	if *jsonFile != "" {
		b, err := json.MarshalIndent(c.report, "", "  ")
		if err != nil {
			return 1, err
		}
		if err := os.MkdirAll(filepath.Dir(*jsonFile), 0o755); err != nil {
			return 1, err
		}
		if err := os.WriteFile(*jsonFile, append(b, '\n'), 0o644); err != nil {
			return 1, err
		}
	}
	missed := 0
	for _, g := range c.report.Goals {
		if !g.OK {
			missed++
		}
	}
	fmt.Printf("\nbench: %d goals, %d missed\n", len(c.report.Goals), missed)
	if missed > 0 {
		return 1, nil
	}
	return 0, nil
}

// part runs one part in a lab of its own and prints what it added.
func part(ctx context.Context, c *config, name string, run func(context.Context, *config) error) (err error) {
	start := time.Now()
	if c.lab, err = lab.New(ctx, lab.Options{Bin: c.bin}); err != nil {
		return err
	}
	defer func() {
		c.unmount()
		if closeErr := c.lab.Close(); err == nil {
			err = closeErr
		}
	}()
	before := len(c.report.Rows)
	if err := run(ctx, c); err != nil {
		c.lab.Logs(os.Stderr, 20)
		return fmt.Errorf("%s: %w", name, err)
	}
	var printed []string
	for _, row := range c.report.Rows[before:] {
		if !slices.Contains(printed, row.Part) {
			printed = append(printed, row.Part)
			c.report.print(os.Stdout, row.Part)
		}
	}
	fmt.Printf("  (%s took %.0f s)\n", name, time.Since(start).Seconds())
	return nil
}

func machine() string {
	var uts syscall.Utsname
	syscall.Uname(&uts)
	var release []byte
	for _, b := range uts.Release {
		if b == 0 {
			break
		}
		release = append(release, byte(b))
	}
	ipt, _ := exec.Command("iptables", "--version").Output()
	return fmt.Sprintf("%d cores, Linux %s, %s, %s", runtime.NumCPU(), release, runtime.Version(), strings.TrimSpace(string(ipt)))
}
