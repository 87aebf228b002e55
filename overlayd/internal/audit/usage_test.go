package audit

import (
	"context"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
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

// Two blocks have more addresses than the bridge of a half has ports: it is full when
// the ports are taken, and then says so.
func TestHalfUsagesByPorts(t *testing.T) {
	stats := func(subnet string, used uint64) Usage {
		p := netip.MustParsePrefix(subnet)
		return Usage{Overlay: "dcos", Half: conf.Docker, Stats: ipam.Stats{Range: p, Total: conf.Capacity(p), Used: used}}
	}
	got := HalfUsages([]Usage{stats("9.0.4.0/22", 1021), stats("9.0.12.0/22", 2), stats("fd01::/96", 1023), stats("fd01::1:0:0/96", 0)})
	want := api.Count{Total: conf.BridgePorts, Used: conf.BridgePorts}
	if len(got) != 1 || got[0].Count != want || got[0].Level() != api.LevelFull || got[0].Subnet.String() != "9.0.4.0/22" || got[0].Subnet6.String() != "fd01::/96" {
		t.Errorf("%+v, want %+v", got, want)
	}
}
