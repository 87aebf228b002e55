package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"overlayd.internal/overlay/integration/lab"
)

const (
	recordingName = "ours, calls logged and counted"
	silentName    = "the same built without"

	// recordingRounds is for one in -rounds: what is looked for is a hundredth.
	recordingRounds = 10
	recordingLimit  = 1.03
)

// recording measures what the log and the counters of calls take of an ADD and a DEL:
// the same program, built with and without, on one host, in turns.
func recording(ctx context.Context, c *config) error {
	host, err := c.startHost(ctx, clusterYAML)
	if err != nil {
		return err
	}
	b, err := makeBox(ctx, c.lab, host.Netns, "c", 1)
	if err != nil {
		return err
	}
	var all []variant
	for _, v := range [...][2]string{{recordingName, c.bin}, {silentName, c.silent}} {
		bin, err := c.install(v[1], "m-overlay")
		if err != nil {
			return fmt.Errorf("%w; scripts/bench builds it", err)
		}
		all = append(all, b.cniVariant(v[0], filepath.Join(bin, "m-overlay"), bin, map[string]any{
			"cniVersion": "1.0.0", "name": "v4", "type": "m-overlay", "runDir": host.RunDir, "ipam": map[string]any{"type": "overlay-ipam"},
		}))
	}
	before, err := logged(ctx, host)
	if err != nil {
		return err
	}
	rounds := recordingRounds * c.rounds
	if err := b.interleaved(ctx, c.report, rounds, all); err != nil {
		return err
	}
	// Each ADD and DEL of the one, and none of the other.
	after, err := logged(ctx, host)
	if want := 2 * (rounds + 1); err == nil && after-before != want {
		err = fmt.Errorf("%d calls were logged, want %d", after-before, want)
	}
	for _, verb := range [...]string{"ADD", "DEL"} {
		c.report.ratio(verb, recordingName, silentName, "<=", recordingLimit)
	}
	return err
}

// logged is how many calls stand in the host's logs.
func logged(ctx context.Context, h *lab.Host) (n int, err error) {
	out, err := h.Run(ctx, "sh", "-c", "cat "+h.RunDir+"/cni.log* 2>/dev/null; true")
	return strings.Count(out, "verb="), err
}
