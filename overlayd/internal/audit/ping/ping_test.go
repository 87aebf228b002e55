package ping

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"
)

// What was measured is there when the time is up, and what was not is not guessed.
func TestRunEnds(t *testing.T) {
	up := errors.New("the time is up")
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, up)
	defer cancel()
	// No packet is so large, and its answer is waited for.
	rows, err := Run(ctx, Options{MTU: 70_000, Count: 1, Wait: time.Hour}, []Target{{Address: netip.MustParseAddr("127.0.0.1"), AgentID: "here"}})
	if !errors.Is(err, up) || len(rows) != 1 || rows[0].Sent != 1 || rows[0].Received != 1 || rows[0].Avg <= 0 || rows[0].PathMTU != 0 {
		t.Errorf("%v: %+v", err, rows)
	}
	rows, err = Run(ctx, Options{MTU: 1500, Count: 1, Wait: time.Hour}, []Target{{Address: netip.MustParseAddr("127.0.0.1"), AgentID: "here"}})
	if !errors.Is(err, up) || len(rows) != 0 {
		t.Errorf("none was measured: %v: %+v", err, rows)
	}
}
