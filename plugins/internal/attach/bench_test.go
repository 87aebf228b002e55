package attach

import (
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// BenchmarkProgram measures ADD and DEL as a runtime sees them, from the start
// of the program to its end, interleaved with the floor program of the
// benchmarks (raw netlink, no addresses to manage, no result). It prints
// medians in microseconds.
//
// ADD sends nine netlink messages in five system calls, eleven with both
// families: the pair and its marks; the link-local address, an address of each
// family, the link up, a route of each family; the state of three links. DEL
// sends three: it looks for the host end of either half and removes the one that
// is there.
func BenchmarkProgram(b *testing.B) {
	m := newMachine(b)
	floor := filepath.Join(b.TempDir(), "floor")
	if out, err := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", floor, "overlayd.internal/overlay/integration/bench/floor").CombinedOutput(); err != nil {
		b.Fatalf("build floor: %v\n%s", err, out)
	}
	container := newNamespace(b)
	times := map[string][]time.Duration{}
	measure := func(what string, cmd func()) {
		start := time.Now()
		cmd()
		times[what] = append(times[what], time.Since(start))
	}
	run := func(args ...string) {
		m.host.inside(b, func() error { return exec.Command(floor, args...).Run() })
	}
	for b.Loop() {
		for _, overlay := range []string{"dcos", "both"} {
			c := call{command: "ADD", netns: container.path, conf: m.config(overlay, "1.0.0")}
			measure("add-"+overlay, func() { m.ok(c) })
			c.command = "DEL"
			measure("del-"+overlay, func() { m.ok(c) })
		}
		measure("add-floor", func() { run("add", container.path, "vfloor", "eth0", "d-dcos", "9.0.1.250/25", "9.0.1.129") })
		measure("del-floor", func() { run("del", "vfloor") })
	}
	for what, all := range times {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Microseconds()), what+"-us")
	}
}
