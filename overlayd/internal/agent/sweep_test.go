package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/netns"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/problems"
)

func TestDue(t *testing.T) {
	a := abandoned{"dcos", conf.Mesos, conf.Key{1}, 10}
	b := abandoned{"dcos", conf.Docker, conf.Key{2}, 20}
	again := a
	again.since = 30
	type list = []abandoned
	looks := []struct {
		name  string
		at    time.Duration
		found list
		want  list
	}{
		{"first look", 0, list{a}, nil},
		{"too early", 59 * time.Second, list{a, b}, nil},
		{"a minute", 60 * time.Second, list{a, b}, list{a}},
		{"it could not be released, and is due again", 90 * time.Second, list{a, b}, list{a}},
		{"back for a moment", 100 * time.Second, list{b}, nil},
		{"gone again: from the start", 119 * time.Second, list{a, b}, list{b}},
		{"made again: another one", 200 * time.Second, list{again}, nil},
		{"a minute later", 260 * time.Second, list{again}, list{again}},
		{"nothing", 300 * time.Second, nil, nil},
	}
	s := &sweeper{apart: time.Minute}
	for _, l := range looks {
		if diff := cmp.Diff(l.want, s.due(l.at, l.found, nil), cmp.AllowUnexported(abandoned{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", l.name, diff)
		}
	}
	if len(s.seen) != 0 {
		t.Errorf("remembers %v", s.seen)
	}

	// A look that failed neither counts nor starts anew.
	s.due(0, list{a}, nil)
	if got := s.due(70*time.Second, nil, map[string]bool{"dcos": true}); got != nil {
		t.Errorf("unread: %v is due", got)
	}
	if got := s.due(80*time.Second, list{a}, map[string]bool{"dcos6": true}); len(got) != 1 {
		t.Errorf("read again: %v is due", got)
	}
}

// TestSweep: real address stores of containers that never had an interface.
func TestSweep(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	now := conf.Boottime()
	open := func(boot string) *ipam.Store {
		s, err := ipam.Open(ctx, ipam.Options{Dir: filepath.Join(dir, conf.IPAMDir), Overlay: "dcos", BootID: boot})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	attachments := func() (out []string) {
		s := open("")
		defer s.Close()
		recs, err := s.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range recs {
			out = append(out, r.ContainerID)
		}
		return out
	}
	allocate := func(boot, id string, netns netns.Ref) {
		s := open(boot)
		defer s.Close()
		_, err := s.Allocate(ctx, ipam.Request{
			Attachment: conf.Attachment{Network: "n", ContainerID: id, IfName: "eth0"}, Half: conf.Mesos,
			Ranges: []netip.Prefix{netip.MustParsePrefix("9.0.1.0/25")}, NetNS: netns,
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	living := netns.Look("/proc/self/ns/net")
	dead := living
	dead.Path, dead.Inode = "/nonexistent", 1

	s := &sweeper{runDir: dir, apart: time.Minute, now: func() time.Duration { return now }, log: slog.New(slog.DiscardHandler), problems: problems.New(slog.New(slog.DiscardHandler))}
	s.round(ctx) // there is nothing yet

	allocate("earlier boot", "rebooted", netns.Ref{})
	s.round(ctx)
	if got := attachments(); len(got) > 0 {
		t.Errorf("of an earlier boot: %v", got)
	}

	allocate("", "killed", netns.Ref{})
	allocate("", "dead", dead)
	allocate("", "living", living)
	s.round(ctx)
	now += 30 * time.Second
	allocate("", "killed", netns.Ref{}) // its ADD is tried again
	s.round(ctx)
	now += 30 * time.Second
	s.round(ctx)
	sorted := cmp.Transformer("set", func(in []string) map[string]bool {
		out := map[string]bool{}
		for _, id := range in {
			out[id] = true
		}
		return out
	})
	if diff := cmp.Diff([]string{"killed", "living"}, attachments(), sorted); diff != "" {
		t.Errorf("after a minute (-want +got):\n%s", diff)
	}
	now += 30 * time.Second
	s.round(ctx)
	if diff := cmp.Diff([]string{"living"}, attachments(), sorted); diff != "" {
		t.Errorf("half a minute later (-want +got):\n%s", diff)
	}
}

// What cannot be looked at is logged once, not at every look.
func TestSweepLogsOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	log := &lockedBuffer{}
	logger := slog.New(slog.NewTextHandler(log, nil))
	s := &sweeper{runDir: dir, now: conf.Boottime, log: logger, problems: problems.New(logger)}
	for range 3 {
		s.round(t.Context())
	}
	must(t, os.Mkdir(dir, 0o755))
	for range 2 {
		s.round(t.Context())
	}
	if begun, ended := strings.Count(log.String(), "level=WARN"), strings.Count(log.String(), "recovered"); begun != 1 || ended != 1 {
		t.Errorf("logged %d times that it began and %d times that it ended:\n%s", begun, ended, log)
	}
}

// What was in use in an earlier boot has cooled some time, though nobody attaches
// anything: each snapshot would have it rest from when it is taken.
func TestSweepBeginsTheBoot(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	const cooling = time.Minute
	half := []netip.Prefix{netip.MustParsePrefix("9.0.1.0/25")}
	o := ipam.Options{Dir: filepath.Join(dir, conf.IPAMDir), Overlay: "dcos", BootID: "earlier boot", Cooling: cooling}
	before, err := ipam.Open(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	_, err = before.Allocate(ctx, ipam.Request{Attachment: conf.Attachment{Network: "n", ContainerID: "rebooted", IfName: "eth0"}, Half: conf.Mesos, Ranges: half})
	if err := errors.Join(err, before.Close()); err != nil {
		t.Fatal(err)
	}
	o.BootID = ""
	counts := func(later time.Duration) (used, cooling uint64) {
		t.Helper()
		o.Now = func() time.Duration { return conf.Boottime() + later }
		s, err := ipam.TakeSnapshot(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		st, err := s.Stats(ctx, conf.Mesos, half)
		if err != nil {
			t.Fatal(err)
		}
		return st[0].Used, st[0].Cooling
	}
	s := &sweeper{runDir: dir, cooling: cooling, apart: time.Minute, now: conf.Boottime, log: slog.New(slog.DiscardHandler), problems: problems.New(slog.New(slog.DiscardHandler))}
	s.round(ctx)
	if used, cooling := counts(0); used != 0 || cooling != 1 {
		t.Errorf("%d in use, %d cooling; want one that cools", used, cooling)
	}
	if used, cooling := counts(cooling); used != 0 || cooling != 0 {
		t.Errorf("later: %d in use, %d cooling; want none", used, cooling)
	}
	file := filepath.Join(o.Dir, "dcos.db")
	was, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s.round(ctx)
	if is, err := os.ReadFile(file); err != nil || string(is) != string(was) {
		t.Error("the next look writes again", err)
	}
}
