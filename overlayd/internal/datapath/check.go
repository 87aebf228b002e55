package datapath

import (
	"context"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/rtnl"
)

// check is a Set with resync for the nearly only case: the kernel has every
// entry that it should and no other. Then reading is enough, and whatever has
// to be done concerns the host or its devices. ok is false when it is another
// case, or not known to be this one.
func (d *Datapath) check(ctx context.Context, cfg Config) (r Report, ok bool) {
	l := d.last
	if l.spared || l.noticed || len(l.problems) > 0 {
		return Report{}, false
	}
	cfg.Peers = nil
	have, err := d.read(cfg, &d.index.entries) // which nobody changes while we are locked
	if err != nil || !have.compare.equal() {
		return Report{}, false
	}
	for dst := range have.foreign {
		if _, wanted := d.index.routes[dst]; wanted {
			return Report{}, false
		}
	}
	p := planDevices(cfg, have)
	if p.fresh[conf.VTEPName] || !sameHost(p.cfg, l.supported) {
		return Report{}, false
	}
	p.planLeftBridges(have)
	p.wanted.entries = d.index.entries
	d.last = nil
	r, err = d.carryOut(ctx, cfg, &p, have, l.peers)
	return r, !errors.Is(err, rtnl.ErrOverrun)
}

// comparison tells whether the kernel has exactly the wanted entries while they
// are being read. One that comes twice makes it say no; they come in a row.
type comparison struct {
	want    entries
	differs bool

	neigh, fdb, routes int // how many were met
	lastMAC            conf.MAC
	lastRoute          netip.Prefix
}

func (c *comparison) route(dst netip.Prefix, r route) {
	want, ok := c.want.routes[dst]
	c.differs = c.differs || !ok || want != r || dst == c.lastRoute
	c.lastRoute = dst
	c.routes++
}

func (c *comparison) neighbour(n rtnl.Neighbour) {
	if n.Family == unix.AF_BRIDGE {
		want, ok := c.want.fdb[n.MAC]
		c.differs = c.differs || !ok || want != n.IP || c.fdb > 0 && n.MAC == c.lastMAC
		c.lastMAC = n.MAC
		c.fdb++
		return
	}
	want, ok := c.want.neigh[n.IP]
	c.differs = c.differs || !ok || want != n.MAC
	c.neigh++
}

func (c *comparison) equal() bool {
	return !c.differs && c.neigh == len(c.want.neigh) && c.fdb == len(c.want.fdb) && c.routes == len(c.want.routes)
}
