package agent

import (
	"testing"
	"time"
)

// A few repairs follow each other at once, then one a pause; who was left alone
// may do so again.
func TestAllowance(t *testing.T) {
	a := allowance{most: 3, pause: time.Second}
	now := time.Now()
	for i := range 3 {
		if got := a.wait(now); got != 0 {
			t.Errorf("repair %d waits %v", i, got)
		}
		a.take(now)
		now = now.Add(100 * time.Millisecond)
	}
	for i := range 20 { // against somebody who undoes it each time
		wait := a.wait(now)
		if want := 700 * time.Millisecond; i == 0 && wait != want {
			t.Errorf("the fourth repair waits %v, want %v", wait, want)
		}
		if want := 900 * time.Millisecond; i > 0 && wait != want {
			t.Errorf("repair %d waits %v, want %v", i+4, wait, want)
		}
		now = now.Add(wait)
		a.take(now)
		now = now.Add(100 * time.Millisecond)
	}
	now = now.Add(10 * time.Second)
	for range 3 {
		if got := a.wait(now); got != 0 {
			t.Errorf("after a quiet time it waits %v", got)
		}
		a.take(now)
	}
}
