package agent

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestExpires(t *testing.T) {
	const term = 10 * time.Hour // so the margin is one hour
	synctest.Test(t, func(t *testing.T) {
		now := 100 * time.Hour
		b := boot{id: "this", now: func() time.Duration { return now }}
		for _, tc := range []struct {
			name string
			r    renewal
			want time.Duration
		}{
			{"this boot", renewal{BootID: "this", Boottime: 98 * time.Hour}, 107 * time.Hour},
			{"this boot, wall clock set back by years", renewal{BootID: "this", Boottime: 98 * time.Hour, Wall: time.Now().Add(99999 * time.Hour)}, 107 * time.Hour},
			{"earlier boot, two hours ago", renewal{BootID: "last", Boottime: 5000 * time.Hour, Wall: time.Now().Add(-2 * time.Hour)}, 107 * time.Hour},
			{"earlier boot, long ago", renewal{BootID: "last", Wall: time.Now().Add(-1000 * time.Hour)}, 99 * time.Hour},
			{"earlier boot, in the future", renewal{BootID: "last", Wall: time.Now().Add(time.Hour)}, 109 * time.Hour},
		} {
			if got := b.expires(b.adopt(tc.r, term), term); got != tc.want {
				t.Errorf("%s: expires at %s, want %s", tc.name, got, tc.want)
			}
		}
		now = time.Minute // just booted; the end of the term would lie before zero
		if got := b.expires(b.adopt(renewal{BootID: "last", Wall: time.Now().Add(-1000 * time.Hour)}, term), term); got != 1 {
			t.Errorf("ended before this boot: expires at %d, want 1", got)
		}
	})
}

// A machine without a clock of its own believes it was away for no time at all.
// Its lease must end all the same, and earlier once the clock has been set.
func TestExpiresAfterRebootWithoutClock(t *testing.T) {
	const term = 10 * time.Hour
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		b := boot{id: "this", now: func() time.Duration { return time.Minute + time.Since(start) }}
		r := b.adopt(renewal{BootID: "last", Wall: start.Add(3 * time.Hour)}, term) // the clock is behind
		want := time.Minute + 9*time.Hour
		for range 4 {
			if got := b.expires(r, term); got != want {
				t.Errorf("after %s: expires at %s, want %s", time.Since(start), got, want)
			}
			time.Sleep(2 * time.Hour) // the bubble's clock
		}
		r.Wall = time.Now().Add(-9*time.Hour - 30*time.Minute) // as if the clock had been set
		if got, want := b.expires(r, term), b.now()-30*time.Minute; got != want {
			t.Errorf("after the clock was set: expires at %s, want %s", got, want)
		}
	})
}

func TestMargin(t *testing.T) {
	for term, want := range map[time.Duration]time.Duration{
		time.Minute:    6 * time.Second,
		10 * time.Hour: time.Hour,
		24 * time.Hour: time.Hour,
	} {
		if got := margin(term); got != want {
			t.Errorf("margin of %s: %s, want %s", term, got, want)
		}
	}
}

// Renewals move the published expiry only in steps, and never beyond the truth.
func TestLater(t *testing.T) {
	const term = 24 * time.Hour // steps of 72 minutes
	at := func(d time.Duration) int64 { return int64(d) }
	for _, tc := range []struct {
		name                    string
		published, actual, want time.Duration
	}{
		{"first", 0, 23 * time.Hour, 23 * time.Hour},
		{"a renewal", 23 * time.Hour, 23*time.Hour + 30*time.Second, 23 * time.Hour},
		{"many renewals", 23 * time.Hour, 25 * time.Hour, 25 * time.Hour},
		{"shorter than was promised", 23 * time.Hour, 22 * time.Hour, 22 * time.Hour},
	} {
		if got := later(at(tc.published), at(tc.actual), term); got != at(tc.want) {
			t.Errorf("%s: %s, want %s", tc.name, time.Duration(got), tc.want)
		}
	}
}

func TestDeadlineKeepsEarliest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		d := newDeadline()
		d.in(time.Minute)
		d.in(time.Second)
		d.in(time.Hour)
		<-d.timer.C
		if took := time.Since(start); took != time.Second {
			t.Errorf("fired after %s, want 1s", took)
		}
		d.clear()
		if d.isSet() {
			t.Error("still set after clear")
		}
		d.in(time.Hour)
		<-d.timer.C
		if took := time.Since(start); took != time.Hour+time.Second {
			t.Errorf("fired after %s, want 1h0m1s", took)
		}
	})
}
