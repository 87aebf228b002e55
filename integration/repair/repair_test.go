package repair

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// outcome is what became of one fault with one firewall.
type outcome struct {
	Took  time.Duration
	Lost  [3]int // across hosts, the same by IPv6, from a container to outside
	Drift string
}

// TestRepair breaks a host in every way there is while containers talk. In the
// short run it does so for some of them, with the two firewalls that are mostly
// found.
func TestRepair(t *testing.T) {
	r := openRecord(t)
	for _, firewall := range firewalls {
		left := r.left(firewall)
		if !*full && firewall == "iptables-legacy" || len(left) == 0 || r.over() {
			continue
		}
		t.Run(firewall, func(t *testing.T) { sufferAll(t, firewall, left, r) })
	}
	if *full { // programs take seconds to start
		t.Run("programs", func(t *testing.T) { testPrograms(t, r) })
	}
	switch {
	case !*full || *docFile == "":
	case r.whole():
		must(t, os.WriteFile(*docFile, []byte(page(r)), 0o644))
	case *part == 0:
		t.Errorf("%s is not written: not everything was measured", *docFile)
	}
	if !t.Failed() && (!*full || r.whole()) {
		checkPage(t)
	}
}

// sufferAll makes faults on a host with a firewall, one after the other.
func sufferAll(t *testing.T, firewall string, left []fault, r *record) {
	x := newSite(t, firewall)
	x.settle()
	if r.Faults[firewall] == nil {
		r.Faults[firewall] = map[string]outcome{}
	}
	for _, f := range left {
		if r.over() {
			return
		}
		ok := t.Run(f.name, func(t *testing.T) {
			x := *x
			x.t = t
			r.Faults[firewall][f.name] = x.suffer(f)
			r.keep(t)
		})
		if !ok {
			t.Fatal("what comes after a fault that was not repaired says nothing")
		}
	}
}

// settle waits until the host has been left alone for longer than the agent's
// pause between two repairs.
func (x *site) settle() {
	x.t.Helper()
	before, quiet := "", time.Now()
	x.wait("the host to be quiet", 30*time.Second, func() error {
		now, err := x.snapshot(everyPart()...)
		if err != nil {
			return err
		}
		if now != before {
			before, quiet = now, time.Now()
		}
		if time.Since(quiet) < 1200*time.Millisecond {
			return errors.New("it changes")
		}
		return nil
	})
}

// suffer breaks the host and waits until it is as it was, or the fault is named
// in the status.
func (x *site) suffer(f fault) (o outcome) {
	t := x.t
	before, err := x.snapshot(everyPart()...)
	must(t, err)
	drift, logged := x.drift(), x.logged()
	streams := x.streams()
	flow := func() error {
		for i, s := range streams {
			if !s.flows(20) {
				return fmt.Errorf("stream %d to %s does not flow", i, s.to)
			}
		}
		return nil
	}
	x.wait("all to talk", 10*time.Second, flow)

	began := time.Now()
	x.sh(f.damage)
	if f.named != "" {
		x.wait("the status to name it", f.limit(), func() error { return x.says(f.named) })
		o.Took = time.Since(began)
	} else {
		o.Took = x.repaired(f, before, began)
	}
	if f.undo != "" {
		x.sh(f.undo)
	}
	x.wait("everything to be as it was", silent, func() error {
		after, err := x.snapshot(everyPart()...)
		if err == nil && after != before {
			err = fmt.Errorf("it differs:\n%s", difference(before, after))
		}
		return err
	})
	x.wait("all to talk again", 10*time.Second, flow)
	for i, s := range streams {
		_, o.Lost[i] = s.finish()
	}
	x.wait("the status to be well", silent, x.well)
	if f.named == "" {
		x.wait("the repair to be counted and logged", 5*time.Second, func() error {
			if increase(drift, x.drift()) == "" || x.logged() == logged {
				return errors.New("not yet")
			}
			return nil
		})
	}
	o.Drift = increase(drift, x.drift())
	if n := x.logged() - logged; f.named == "" && (n < 1 || n > 2) { // a damage of two steps may be met in between
		t.Errorf("the repair was logged %d times", n)
	}
	t.Logf("%v, lost %v, %s", o.Took.Round(time.Millisecond), o.Lost, o.Drift)
	x.settle()
	return o
}

// streams begins those from a container to one on the other host, the same by
// IPv6, and from a container to outside.
func (x *site) streams() (out []*stream) {
	x.t.Helper()
	for _, p := range []struct {
		from *lab.Netns
		to   netip.Addr
	}{{x.a.Netns, x.b.Addr()}, {x.a6.Netns, x.b6.Addr()}, {x.a.Netns, x.Outside.IP}} {
		s, err := startPing(p.from, p.to)
		must(x.t, err)
		out = append(out, s)
	}
	return out
}

// repaired waits until the parts that a fault shows in are as they were.
func (x *site) repaired(f fault, before string, began time.Time) time.Duration {
	x.t.Helper()
	names := strings.Fields(f.parts)
	if len(names) == 0 {
		names = []string{"rules"}
	}
	want := only(before, names)
	x.wait("the repair", f.limit(), func() error {
		if f.check != "" {
			_, err := x.try(f.check)
			return err
		}
		now, err := x.snapshot(names...)
		if err == nil && now != want {
			err = fmt.Errorf("it differs:\n%s", difference(want, now))
			if f.undo != "" && !strings.Contains(err.Error(), "\n- ") {
				err = nil // nothing is missing; what is too much is the damage's
			}
		}
		return err
	})
	return time.Since(began)
}

// only is a snapshot without the other parts.
func only(snapshot string, names []string) string {
	var out []string
	for line := range strings.Lines(snapshot) {
		section, _, _ := strings.Cut(line, ":")
		if slices.Contains(names, section) {
			out = append(out, strings.TrimSuffix(line, "\n"))
		}
	}
	return strings.Join(out, "\n")
}

// status is what the agent publishes of problems and drift.
type status struct {
	Problems []string
	Drift    struct {
		Counts []struct {
			Kind    string
			Objects int
		}
	}
	Overlays []struct {
		Info  struct{ Name string }
		State struct{ Status, Error string }
	}
}

func (x *site) status() (s status, err error) {
	b, err := x.h.Get(x.t.Context(), "/overlay-agent/overlay")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(b, &s)
}

// says reports whether the status names something.
func (x *site) says(what string) error {
	s, err := x.status()
	if err != nil {
		return err
	}
	if text := fmt.Sprint(s.Problems, s.Overlays); !strings.Contains(text, what) {
		return fmt.Errorf("the status is %s", text)
	}
	return nil
}

// well reports whether the status names nothing.
func (x *site) well() error {
	s, err := x.status()
	if err != nil {
		return err
	}
	for _, o := range s.Overlays {
		if o.State.Status != "STATUS_OK" {
			return fmt.Errorf("overlay %s: %s", o.Info.Name, o.State.Error)
		}
	}
	if len(s.Problems) > 0 {
		return fmt.Errorf("problems: %v", s.Problems)
	}
	return nil
}

func (x *site) drift() map[string]int {
	x.t.Helper()
	s, err := x.status()
	must(x.t, err)
	out := map[string]int{}
	for _, c := range s.Drift.Counts {
		out[c.Kind] = c.Objects
	}
	return out
}

// increase says by how much the counters grew.
func increase(before, after map[string]int) string {
	var out []string
	for _, kind := range slices.Sorted(maps.Keys(after)) {
		if n := after[kind] - before[kind]; n > 0 {
			out = append(out, fmt.Sprintf("%d %s", n, kind))
		}
	}
	return strings.Join(out, ", ")
}

// logged is how many repairs the agent has logged.
func (x *site) logged() int {
	x.t.Helper()
	b, err := os.ReadFile(x.h.Proc.Log)
	must(x.t, err)
	return bytes.Count(b, []byte("kernel state repaired"))
}
