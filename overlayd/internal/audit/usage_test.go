package audit

import (
	"context"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// Who reads the address stores does not wait for those who write, and so they never wait
// for him: an agent that is stopped while it looks keeps nobody from attaching (ADR 0072).
func TestReadsTakeNoLock(t *testing.T) {
	runDir, state := t.TempDir(), sound().State
	held, err := ipam.Open(t.Context(), ipam.Options{Dir: filepath.Join(runDir, conf.IPAMDir), Overlay: "dcos"})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, err := held.Allocate(t.Context(), ipam.Request{Attachment: att, Half: conf.Mesos, Ranges: []netip.Prefix{netip.MustParsePrefix("9.0.1.0/25")}}); err != nil {
		t.Fatal(err)
	}
	if err := conf.WriteJSON(filepath.Join(runDir, conf.StateFile), state, 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	attached, err := ReadAttached(ctx, runDir, state)
	if err != nil || len(attached["dcos"].Records) != 1 {
		t.Errorf("ReadAttached: %+v, %v", attached, err)
	}
	usage, err := ReadUsage(ctx, runDir, state)
	if err != nil || len(usage) != 2 || usage[0].Used != 1 {
		t.Errorf("ReadUsage: %+v, %v", usage, err)
	}
	h, err := Read(ctx, runDir)
	if s := h.Stores["dcos"]; err != nil || s.Err != nil || len(s.Records) != 1 || len(s.Problems) > 0 {
		t.Errorf("Read: %+v, %v", s, err)
	}
}
