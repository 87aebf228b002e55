package firewalld

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
)

// Sources wait until the rules have been set since firewalld started or reloaded;
// what is no longer wanted is taken out of the zone of others that it was put into.
func TestKeeperSources(t *testing.T) {
	l := newLab(t, "")
	l.startFirewalld()
	l.cmd("--permanent --zone=trusted --add-source=10.77.0.0/16")
	l.cmd("--zone=trusted --add-source=10.77.0.0/16 --add-source=10.78.0.0/16 --add-source=10.79.0.0/16 --add-source=10.80.0.0/16")
	k := NewKeeper(l.address, make(chan struct{}, 1))
	want := Traffic{
		Devices: []string{"vtep1024", "d-dcos"}, Underlay: "eth0",
		Sources: []netip.Prefix{netip.MustParsePrefix("9.0.0.0/8"), netip.MustParsePrefix("44.128.0.0/20")},
		Former:  []netip.Prefix{netip.MustParsePrefix("10.77.0.0/16"), netip.MustParsePrefix("10.78.0.0/16")},
	}
	// Of an overlay that was removed while no agent ran, and of one that is there still.
	k.Formerly([]netip.Prefix{netip.MustParsePrefix("10.80.0.0/16"), netip.MustParsePrefix("9.0.0.0/8")})
	first := k.Round()
	k.Want(want, first)
	<-k.kick // firewalld is told though nobody asks after the bus is there
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = l.ns.Do(func(ns.NetNS) error { return k.Run(ctx) }) })
	defer running.Wait()
	defer cancel()
	has := func(zone string, kind membership, want ...string) {
		t.Helper()
		l.wait(zone+" with "+strings.Join(want, ", "), func() bool { return slices.Equal(l.members(zone, kind), want) })
	}
	news := func(since Round) Round {
		t.Helper()
		l.wait("another round", func() bool { return k.Round() != since })
		return k.Round()
	}
	round := news(first)
	has("trusted", interfaces, "d-dcos", "vtep1024")
	if got := l.members("trusted", sources); slices.Contains(got, "9.0.0.0/8") {
		t.Errorf("sources are told before the rules were set: %s", got)
	}
	k.Want(want, round)
	has("trusted", sources, "10.77.0.0/16", "10.79.0.0/16", "44.128.0.0/20", "9.0.0.0/8")
	want.Devices, want.Sources = want.Devices[:1], want.Sources[:1]
	k.Want(want, round)
	has("trusted", interfaces, "vtep1024")
	has("trusted", sources, "10.77.0.0/16", "10.79.0.0/16", "9.0.0.0/8")

	l.cmd("--reload")
	second := news(round)
	// Rules that were set before the reload do not count, nor those that failed.
	for _, set := range []Round{round, 0} {
		for _, devices := range [][]string{{"vtep1024", "d-dcos"}, {"vtep1024"}} {
			want.Devices = devices
			k.Want(want, set)
			has("overlay", interfaces, slices.Sorted(slices.Values(devices))...)
		}
		if got := l.members("overlay", sources); len(got) > 0 {
			t.Errorf("sources are told before the rules were set again: %s", got)
		}
	}
	k.Want(want, second)
	has("overlay", sources, "9.0.0.0/8")
	if got := l.cmd("--permanent --zone=overlay --list-sources"); got != "" {
		t.Errorf("sources are permanent: %s", got)
	}
}

// members asks firewalld what a zone has at run time.
func (l *lab) members(zone string, kind membership) (have []string) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	conn := Client{l.address}.connect(ctx)
	if conn == nil {
		l.t.Fatal("there is no bus")
	}
	defer conn.Close()
	b := &bus{ctx, conn}
	_ = b.daemon(zones+kind.list, zone).Store(&have) // none, where there is no such zone
	slices.Sort(have)
	return have
}

// A bus that takes connections and says nothing is given up.
func TestSilentBus(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bus")
	silent, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	k := NewKeeper("unix:path="+path, make(chan struct{}, 1))
	k.patience = 50 * time.Millisecond
	given := make(chan bool, 1)
	go func() { given <- k.subscribe(t.Context(), nil) == nil }()
	select {
	case up := <-given:
		if !up {
			t.Error("a bus that never answered is taken for one")
		}
	case <-time.After(30 * time.Second):
		t.Error("still waiting for a bus that does not answer")
	}
}
