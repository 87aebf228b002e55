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
	table *nftables.Firewall
	off   error // why there is none
	busy  error // another process has it at present
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
	want := firewall.BuildGuard(c)
	want.IPv6 = want.IPv6 && ipv6
	changed, err = g.table.Set(ctx, want)
	if nftables.IsUnsupported(err) {
		g.off = err
		g.close()
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

// elements changes the peers.
func (g *guard) elements(ctx context.Context, set string, add, remove []firewall.Element) error {
	if g.table == nil || set != firewall.PeersSet {
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
