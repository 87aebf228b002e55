package agent

import (
	"time"

	"overlayd.internal/overlay/conf"
)

// renewal is when a lease was last renewed. Within a boot CLOCK_BOOTTIME
// counts: it goes on while the machine sleeps and nobody can set it. Across a
// reboot there is only the wall clock.
type renewal struct {
	BootID   string        `json:"boot_id"`
	Boottime time.Duration `json:"boottime_ns"`
	Wall     time.Time     `json:"wall"`
	// Estimated: it was in an earlier boot, and Boottime is what the wall clock
	// made of it. A wall clock that is set right later can only make it earlier.
	Estimated bool `json:"estimated,omitzero"`
}

// boot is the present boot.
type boot struct {
	id  string
	now func() time.Duration // CLOCK_BOOTTIME
}

// adopt puts a renewal of an earlier boot into terms of the present one.
func (b boot) adopt(r renewal, term time.Duration) renewal {
	if r.BootID == b.id {
		return r
	}
	return renewal{BootID: b.id, Boottime: b.byWallClock(r, term), Wall: r.Wall, Estimated: true}
}

// byWallClock is the CLOCK_BOOTTIME of a renewal as far as the wall clock can
// tell: between one term ago and now.
func (b boot) byWallClock(r renewal, term time.Duration) time.Duration {
	return b.now() - min(max(time.Since(r.Wall), 0), term)
}

// expires returns the CLOCK_BOOTTIME after which no address may be given out
// under a lease renewed then, in the present boot. It is at least 1.
func (b boot) expires(r renewal, term time.Duration) time.Duration {
	since := r.Boottime
	if r.Estimated {
		since = min(since, b.byWallClock(r, term))
	}
	return max(since+term-margin(term), 1)
}

// margin is how long before the end of a term the agent stops: what a container
// launch and a slow clock may take.
func margin(term time.Duration) time.Duration { return min(term/10, time.Hour) }

// worthStoring is how far an expiry must move for it to be written again.
func worthStoring(term time.Duration) time.Duration { return term / 20 }

// renewEvery is how often a lease is renewed: as often as configured, but at
// least three times in a term.
func renewEvery(usual, term time.Duration) time.Duration { return min(usual, term/3) }

// later decides which expiry to publish: the last published one if the true
// one is not much later, so that not every renewal writes a file; never one
// later than the true one.
func later(published, actual int64, term time.Duration) int64 {
	if moved := time.Duration(actual - published); moved >= 0 && moved < worthStoring(term) {
		return published
	}
	return actual
}

// heldLease is a lease and its last renewal.
type heldLease struct {
	conf.Lease
	renewed renewal
	// returned are further blocks of it that this host no longer uses and the
	// coordinator may not have taken back yet.
	returned []returnedBlock
}
