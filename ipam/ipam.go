// Package ipam is the address store of one host: one bbolt file per overlay on
// tmpfs, <run-dir>/ipam/<overlay>.db, guarded by a blocking file mutex beside it
// (bbolt's own lock polls every 50 ms and is unfair). It has one bucket per half
// and every record carries the boot it was made in.
//
// A store is opened for one operation and closed again: the CNI programs are
// separate processes, and nobody may keep the file from them. Those who only read
// take a Snapshot, which locks nothing (ADR 0072).
//
// An address is free, in use by one attachment, or cooling (released, not yet
// to be reused). Never-used addresses are handed out first, in order; after
// that the one that has been free for longest. The cost does not depend on how
// many are in use.
package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/netns"
)

// Request asks for one address of each family that the half has.
type Request struct {
	conf.Attachment
	Half conf.Half // whose pool it is: conf.Overlay.Pool
	By   conf.Half // whose program asks; empty: Half's
	// Ranges are the half's prefixes: conf.AgentOverlay.Ranges. Of several of one
	// family the first is filled before the next.
	Ranges []netip.Prefix
	// Want are addresses asked for by name, at most one per family. Each is
	// granted or refused with a reason, never ignored.
	Want []netip.Addr
	// Exact: Want is all there is to give, because an IPAM plugin of others has
	// chosen. A family without an address in it gets none.
	Exact bool
	// NetNS is given where the attachment gets no host end of ours; see Record.
	NetNS netns.Ref
	// Origin is kept for people; nothing is decided by it.
	Origin conf.Origin
}

// Allocation is the answer: an address of each family, in the order in which the
// families stand in Request.Ranges.
type Allocation struct {
	Addrs []netip.Addr
	// Existing: the attachment had these addresses already, so that whoever
	// fails later must not release them. Its Record is as young as a new one.
	Existing bool
	// Flush are the addresses among Addrs that were taken before they had
	// cooled. Conntrack may still know their last owner.
	Flush []netip.Addr
}

// Record is one stored attachment.
type Record struct {
	conf.Attachment
	Half conf.Half `json:"half"` // whose program has attached it
	// Pool is the half whose pool the addresses are from, where that is not Half.
	Pool   conf.Half     `json:"-"`
	Addrs  []netip.Addr  `json:"addrs"`
	BootID string        `json:"boot_id"`
	Since  time.Duration `json:"since"` // CLOCK_BOOTTIME of the last Allocate
	// NetNS tells whether the container is still there, where no host end of ours
	// can: the address is for another main plugin's interface. Zero: there is a
	// host end, or the attachment is Docker's.
	NetNS netns.Ref `json:"netns,omitzero"`
	// Origin is of the last Allocate. It lies beside the record, where programs of
	// earlier releases do not look (ADR 0056).
	Origin conf.Origin `json:"origin,omitzero"`
}

// Errors a caller branches on.
var (
	// ErrBusy: the store could not be locked in time. Try again later.
	ErrBusy = errors.New("address store is busy")
	// ErrDamaged: the file cannot be trusted and was not touched.
	ErrDamaged = errors.New("address store is damaged")
)

// UnavailableError says why an address asked for by name was refused.
type UnavailableError struct {
	Addr   netip.Addr
	Reason string // "is in use by container X", "is the gateway", "is outside 9.0.1.0/25", ...
}

func (e *UnavailableError) Error() string { return fmt.Sprintf("address %s %s", e.Addr, e.Reason) }
