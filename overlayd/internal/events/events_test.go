package events_test

import (
	"fmt"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/events"
)

func TestRing(t *testing.T) {
	now := time.Unix(1_790_000_000, 0)
	r := events.New(func() time.Time { return now })
	if got, more, missed := r.After(0); len(got) != 0 || more == nil || missed || r.Last() != 0 {
		t.Fatalf("an empty ring has %v, %v", got, missed)
	}
	_, more, _ := r.After(0)
	const n = 2*events.Remembered + 7
	for i := range n {
		r.Add(api.Event{Text: fmt.Sprint(i)})
	}
	select {
	case <-more:
	default:
		t.Error("who waits is not told")
	}
	got, _, missed := r.After(0)
	if len(got) != events.Remembered || !missed {
		t.Fatalf("%d events, missed %v", len(got), missed)
	}
	for i, e := range got {
		if e.Text != fmt.Sprint(n-events.Remembered+i) || i > 0 && e.ID <= got[i-1].ID {
			t.Fatalf("event %d is %+v", i, e)
		}
	}
	if got[0].ID < now.UnixMicro() {
		t.Errorf("the id %d is below the microseconds of the clock", got[0].ID)
	}
	if tail, _, missed := r.After(got[len(got)-3].ID); len(tail) != 2 || missed {
		t.Errorf("after the last but two: %v, missed %v", tail, missed)
	}
	if tail, _, missed := r.After(got[0].ID - 1); len(tail) != events.Remembered || missed {
		t.Errorf("from the oldest on: %d events, missed %v", len(tail), missed)
	}
	now = now.Add(-time.Hour) // a clock that goes back does not turn the order round
	last := r.Last()
	r.Add(api.Event{Text: "late"})
	if tail, _, _ := r.After(last); len(tail) != 1 || tail[0].ID != last+1 {
		t.Errorf("after the clock went back: %v", tail)
	}
}
