package datapath

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/firewall/nftables"
)

// guard keeps VXLAN of others out while somebody flushes the other rules: a table
// of nftables that belongs to this process, whatever makes those. Where the
// kernel has no such tables the other rules are all there is.
type guard struct {
	table     guardTable
	off       error // why there is none
	unbounded error // why it does not bound what containers make the host resolve
	busy      error // another process has it at present
}

// guardTable is a table that nftables.NewGuard opens.
type guardTable interface {
	Set(ctx context.Context, r firewall.Ruleset) (changed int, err error)
	Elements(ctx context.Context, set string, add, remove []firewall.Element) error
	Close()
}

// set makes the table what it should be.
func (g *guard) set(ctx context.Context, c firewall.Config, ipv6 bool) (changed int, err error) {
	if g.off != nil {
		return 0, nil
	}
	if g.table == nil {
		if g.off = nftables.Usable(); g.off != nil {
			return 0, nil
		}
		g.table = nftables.NewGuard()
	}
	changed, err = g.make(ctx, c, ipv6)
	if g.unbounded == nil && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP)) {
		// All is one transaction: what the kernel does not have of the bounds would
		// take the rest away too.
		g.unbounded = err
		if changed, err = g.make(ctx, c, ipv6); err != nil {
			g.unbounded = nil // it was not that
		}
	}
	if nftables.IsUnsupported(err) {
		g.close()
		// It may be a table that lies there which cannot be owned, and not the kernel:
		// one that has no tables at all refuses this as well.
		if removed, failed := nftables.RemoveUnowned(ctx); failed == nil && removed > 0 {
			changed, err = g.set(ctx, c, ipv6)
			return removed + changed, err
		}
		g.off = err
		return 0, nil
	}
	g.busy = nil
	if errors.Is(err, unix.EPERM) {
		// The agent before this one, which has not ended yet; it is as that left it.
		g.busy = err
		g.close()
		return 0, nil
	}
	if err != nil {
		err = fmt.Errorf("guard the VXLAN port: %w", err)
	}
	return changed, err
}

// holds reports whether the table is there and this process has it.
func (g *guard) holds() bool { return g.table != nil && g.off == nil && g.busy == nil }

// make makes the table, with bounds unless the kernel cannot do those.
func (g *guard) make(ctx context.Context, c firewall.Config, ipv6 bool) (changed int, err error) {
	want := firewall.BuildGuard(c, g.unbounded == nil)
	want.IPv6 = want.IPv6 && ipv6
	return g.table.Set(ctx, want)
}

// elements changes the peers.
func (g *guard) elements(ctx context.Context, set string, add, remove []firewall.Element) error {
	if g.table == nil || set == firewall.DirectSet {
		return nil
	}
	return g.table.Elements(ctx, set, add, remove)
}

// close leaves the table to the next process.
func (g *guard) close() {
	if g.table != nil {
		g.table.Close()
		g.table = nil
	}
}
