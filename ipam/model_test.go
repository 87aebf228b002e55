package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"overlayd.internal/overlay/conf"
)

// A model is the store as one would write it without a thought for cost: all
// addresses of a small range in one table.
type model struct {
	state map[netip.Addr]*modelAddr
	seq   int
}

type modelAddr struct {
	owner    string // in use by
	released time.Duration
	seq      int // order of release; 0: never used
}

func newModel(p netip.Prefix) *model {
	m := &model{state: map[netip.Addr]*modelAddr{}}
	for a := conf.FirstContainer(p); a.Compare(conf.LastContainer(p)) <= 0; a = a.Next() {
		m.state[a] = &modelAddr{}
	}
	return m
}

func (m *model) of(owner string) (netip.Addr, bool) {
	for a, s := range m.state {
		if s.owner == owner {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// next is the lowest never-used address, or else the one released first.
func (m *model) next() (best netip.Addr, ok bool) {
	better := func(a, b netip.Addr) bool {
		if x, y := m.state[a].seq, m.state[b].seq; x != y {
			return x < y
		}
		return a.Less(b)
	}
	for a, s := range m.state {
		if s.owner == "" && (!ok || better(a, best)) {
			best, ok = a, true
		}
	}
	return best, ok
}

func (m *model) take(a netip.Addr, owner string, now time.Duration) (early bool) {
	s := m.state[a]
	early = s.seq > 0 && now-s.released < cooling
	s.owner = owner
	return early
}

func (m *model) release(owner string, now time.Duration) (netip.Addr, bool) {
	a, ok := m.of(owner)
	if ok {
		m.seq++
		*m.state[a] = modelAddr{released: now, seq: m.seq}
	}
	return a, ok
}

// A machine runs the same operations on a store and on two models, one for each
// family, for each half.
type machine struct {
	o      Options
	now    time.Duration
	boot   int
	ranges map[conf.Half][]netip.Prefix
	models map[conf.Half][]*model
	early  map[conf.Half][]uint64
	store  *Store
}

var ids = rapid.SampledFrom([]string{"a", "b", "c", "d", "e", "f", "g", "h", "i", "j"})
var anyHalf = rapid.SampledFrom([]conf.Half{conf.Mesos, conf.Docker})

func (m *machine) open(t *rapid.T) {
	s, err := Open(context.Background(), m.o)
	if err != nil {
		t.Fatal(err)
	}
	m.store = s
}

func (m *machine) close(t *rapid.T) {
	if err := m.store.Close(); err != nil {
		t.Fatal(err)
	}
}

func (m *machine) Allocate(t *rapid.T) {
	half, id := anyHalf.Draw(t, "half"), ids.Draw(t, "id")
	r := Request{Attachment: att(id), Half: half, Ranges: m.ranges[half]}
	got, err := m.store.Allocate(context.Background(), r)
	models := m.models[half]
	if old, ok := models[0].of(id); ok {
		if err != nil || !got.Existing || got.Addrs[0] != old || got.Flush != nil {
			t.Fatalf("%s has %s and got %v, %v", id, old, got, err)
		}
		return
	}
	var want []netip.Addr
	for _, mm := range models {
		a, ok := mm.next()
		if !ok {
			var ex *ExhaustedError
			if !errors.As(err, &ex) || ex.Stats.Used != ex.Stats.Total || ex.Stats.Cooling != 0 {
				t.Fatalf("want exhaustion, got %v, %v", got, err)
			}
			return
		}
		want = append(want, a)
	}
	m.granted(t, half, id, want, got, err)
}

func (m *machine) granted(t *rapid.T, half conf.Half, id string, want []netip.Addr, got Allocation, err error) {
	if err != nil || got.Existing || !slices.Equal(got.Addrs, want) {
		t.Fatalf("want %v, got %v, %v", want, got, err)
	}
	var flush []netip.Addr
	for i, a := range want {
		if m.models[half][i].take(a, id, m.now) {
			flush = append(flush, a)
			m.early[half][i]++
		}
	}
	if !slices.Equal(flush, got.Flush) {
		t.Fatalf("flush %v, got %v", flush, got.Flush)
	}
}

func (m *machine) Want(t *rapid.T) {
	half, id := anyHalf.Draw(t, "half"), ids.Draw(t, "id")
	p := m.ranges[half][0]
	a := p.Addr()
	for range rapid.IntRange(0, 9).Draw(t, "nth") { // one past the end of a /29
		a = a.Next()
	}
	r := Request{Attachment: att(id), Half: half, Ranges: m.ranges[half], Want: []netip.Addr{a}}
	got, err := m.store.Allocate(context.Background(), r)
	models := m.models[half]
	var un *UnavailableError
	var ex *ExhaustedError
	old, has := models[0].of(id)
	s := models[0].state[a]
	second, ok := models[1].next()
	switch {
	case has && old == a:
		if err != nil || !got.Existing {
			t.Fatalf("%s has %s: %v, %v", id, a, got, err)
		}
	case has, s == nil, s.owner != "":
		if !errors.As(err, &un) {
			t.Fatalf("%s wants %s: %v, %v", id, a, got, err)
		}
	case !ok:
		if !errors.As(err, &ex) {
			t.Fatalf("want exhaustion, got %v, %v", got, err)
		}
	default:
		m.granted(t, half, id, []netip.Addr{a, second}, got, err)
	}
}

func (m *machine) Release(t *rapid.T) {
	id := ids.Draw(t, "id")
	var want []netip.Addr
	for _, half := range conf.Halves {
		for _, mm := range m.models[half] {
			if a, ok := mm.release(id, m.now); ok {
				want = append(want, a)
			}
		}
	}
	got, err := m.store.Release(context.Background(), att(id))
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("released %v, want %v, %v", got, want, err)
	}
}

func (m *machine) GC(t *rapid.T) {
	half := anyHalf.Draw(t, "half")
	keep := rapid.SliceOf(ids).Draw(t, "keep")
	got, err := m.store.GC(context.Background(), "net", half, func(r Record) bool { return slices.Contains(keep, r.ContainerID) })
	if err != nil {
		t.Fatal(err)
	}
	for _, rec := range got { // in the store's order, which the queue has too
		if slices.Contains(keep, rec.ContainerID) {
			t.Fatalf("%s was kept", rec.ContainerID)
		}
		for _, mm := range m.models[half] {
			if _, ok := mm.release(rec.ContainerID, m.now); !ok {
				t.Fatalf("%s had nothing", rec.ContainerID)
			}
		}
	}
	for _, s := range m.models[half][0].state {
		if s.owner != "" && !slices.Contains(keep, s.owner) {
			t.Fatalf("%s was forgotten", s.owner)
		}
	}
}

func (m *machine) Wait(t *rapid.T) {
	m.now += time.Duration(rapid.IntRange(1, 100).Draw(t, "seconds")) * time.Second
}

// Crash leaves what a killed process leaves: the file as it was before anything
// could be tidied up, and no locks.
func (m *machine) Crash(t *rapid.T) {
	b, err := os.ReadFile(m.store.path)
	if err != nil {
		t.Fatal(err)
	}
	m.close(t)
	if err := os.WriteFile(filepath.Join(m.o.Dir, "dcos.db"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	m.open(t)
}

func (m *machine) Reopen(t *rapid.T) {
	m.close(t)
	m.open(t)
}

func (m *machine) Reboot(t *rapid.T) {
	recs, err := m.store.List(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	m.close(t)
	m.boot++
	m.now = time.Second
	m.o.BootID = fmt.Sprint("boot-", m.boot)
	for _, half := range conf.Halves {
		for _, mm := range m.models[half] {
			for _, s := range mm.state {
				s.released = m.now
			}
		}
	}
	for _, rec := range recs {
		for _, mm := range m.models[rec.Half] {
			mm.release(rec.ContainerID, m.now)
		}
	}
	m.open(t)
}

// Check runs after every step.
func (m *machine) Check(t *rapid.T) {
	problems, err := m.store.Verify(context.Background())
	if err != nil || problems != nil {
		t.Fatalf("verify: %v %q", err, problems)
	}
	for _, half := range conf.Halves {
		got, err := m.store.Stats(context.Background(), half, m.ranges[half])
		if err != nil {
			t.Fatal(err)
		}
		for i, mm := range m.models[half] {
			want := Stats{Range: m.ranges[half][i], Total: uint64(len(mm.state)), Early: m.early[half][i]}
			for _, s := range mm.state {
				switch {
				case s.owner != "":
					want.Used++
				case s.seq > 0 && m.now-s.released < cooling:
					want.Cooling++
				}
			}
			if got[i] != want {
				t.Fatalf("%s half: %+v, want %+v", half, got[i], want)
			}
		}
	}
}

func TestModel(t *testing.T) {
	base := tempDir(t)
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp(base, "run-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		m := &machine{
			now: time.Hour,
			ranges: map[conf.Half][]netip.Prefix{
				conf.Mesos:  prefixes("9.0.1.0/29", "fd01:b::/125"), // five and six addresses
				conf.Docker: prefixes("9.0.1.8/29", "fd01:b::8/125"),
			},
			models: map[conf.Half][]*model{},
			early:  map[conf.Half][]uint64{conf.Mesos: {0, 0}, conf.Docker: {0, 0}},
		}
		for half, ranges := range m.ranges {
			for _, p := range ranges {
				m.models[half] = append(m.models[half], newModel(p))
			}
		}
		m.o = Options{Dir: dir, Overlay: "dcos", BootID: "boot-0", Cooling: cooling, Now: func() time.Duration { return m.now }}
		m.open(t)
		defer func() { m.store.Close() }()
		t.Repeat(map[string]func(*rapid.T){
			"":         m.Check,
			"allocate": m.Allocate,
			"want":     m.Want,
			"release":  m.Release,
			"gc":       m.GC,
			"wait":     m.Wait,
			"crash":    m.Crash,
			"reopen":   m.Reopen,
			"reboot":   m.Reboot,
		})
	})
}
