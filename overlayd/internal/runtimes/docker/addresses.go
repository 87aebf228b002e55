package docker

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// A dockerd that is killed gives nothing back, and an address store that had to
// be made anew knows nothing of Docker. So what the stores say Docker has is
// compared, now and then, with what it has.

// suspect is a record whose address no container has.
type suspect struct {
	filed time.Duration // of the record: another one is another case
	since time.Time
}

// inUse is what Docker's containers have of our addresses.
type inUse map[netip.Addr]user

// user is who has an address.
type user struct {
	container string
	id        string // of the container; empty: an address that Docker keeps for others
	network   *network
}

// addresses asks dockerd for the addresses in use in all networks of our
// driver, whoever made them.
func (c *client) addresses(ctx context.Context) (inUse, error) {
	list, err := c.networks(ctx)
	if err != nil {
		return nil, err
	}
	used := inUse{}
	for _, n := range list {
		if n.IPAM.Driver != Driver {
			continue
		}
		n, err := c.network(ctx, n.ID)
		if isStatus(err, http.StatusNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		for id, e := range n.Containers {
			used.add(e.IPv4Address, user{e.Name, id, &n})
			used.add(e.IPv6Address, user{e.Name, id, &n})
		}
		for _, c := range n.IPAM.Config {
			for name, a := range c.AuxiliaryAddresses {
				used.add(a, user{name, "", &n})
			}
		}
	}
	return used, nil
}

// add enters an address, with or without a prefix length, if there is one.
func (u inUse) add(address string, who user) {
	if all, err := conf.ParseAddrs([]string{address}); err == nil {
		u[all[0]] = who
	}
}

// syncAddresses releases what Docker lost and files what we lost.
func (d *Docker) syncAddresses(ctx context.Context) error {
	// Of a store that is made anew after the question, what was granted meanwhile is in
	// neither: that waits for the next look.
	unfiled, err := d.unfiled(ctx)
	if err != nil {
		return err
	}
	asked := conf.Boottime()
	used, err := d.client.addresses(ctx)
	if err != nil {
		return err
	}
	d.keepContainers(used, asked)
	names, err := d.driver.stores.names()
	if err != nil {
		return err
	}
	filed := map[netip.Addr]bool{}
	still := map[conf.Key]suspect{}
	for _, overlay := range names {
		recs, err := d.list(ctx, overlay)
		if err != nil {
			return err
		}
		for _, r := range recs {
			if !r.IsDocker() || len(r.Addrs) != 1 {
				continue
			}
			filed[r.Addrs[0]] = true
			if _, ok := used[r.Addrs[0]]; ok {
				continue
			}
			if err := d.suspect(ctx, overlay, r, still); err != nil {
				return err
			}
		}
	}
	d.missing = still
	all, err := d.fileMissing(ctx, used, filed)
	if !all {
		return err
	}
	return errors.Join(err, d.nowFiled(ctx, unfiled))
}

// list returns the records of a store.
func (d *Docker) list(ctx context.Context, overlay string) ([]ipam.Record, error) {
	s, err := d.driver.stores.read(ctx, overlay)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return s.List(ctx)
}

// unfiled are the pools that wait for nowFiled, by overlay.
func (d *Docker) unfiled(ctx context.Context) (map[string][]conf.Half, error) {
	names, err := d.driver.stores.names()
	if err != nil {
		return nil, err
	}
	out := map[string][]conf.Half{}
	for _, overlay := range names {
		pools, err := d.driver.unfiledOf(ctx, overlay)
		if err != nil {
			return nil, err
		}
		if len(pools) > 0 {
			out[overlay] = pools
		}
	}
	return out, nil
}

// nowFiled has stores that were made anew give out addresses again: all that Docker
// has is in them.
func (d *Docker) nowFiled(ctx context.Context, pools map[string][]conf.Half) error {
	for overlay, halves := range pools {
		s, err := d.driver.stores.open(ctx, overlay, 0)
		if err != nil {
			return err
		}
		err = s.Filed(ctx, halves)
		s.Close()
		if err != nil {
			return err
		}
		d.log.Info("addresses of Docker are filed in a store that was made anew", logkey.Overlay, overlay)
	}
	return nil
}

// LookSoon has the addresses of Docker looked at, as far as there is a dockerd. It does
// not block.
func (d *Docker) LookSoon() {
	select {
	case d.look <- struct{}{}:
	default:
	}
}

// suspect releases a record without a container if it has been one for long
// enough. A container that is being made has its address before Docker shows it.
func (d *Docker) suspect(ctx context.Context, overlay string, r ipam.Record, still map[conf.Key]suspect) error {
	was, missed := d.missing[r.Key()]
	if !missed || was.filed != r.Since {
		still[r.Key()] = suspect{filed: r.Since, since: time.Now()}
		return nil
	}
	if time.Since(was.since) < d.timing.stale {
		still[r.Key()] = was
		return nil
	}
	s, err := d.driver.stores.open(ctx, overlay, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	// Only if it is still the same record: the address may have been given back
	// and taken again since.
	gone, err := s.GC(ctx, r.Network, conf.Docker, func(other ipam.Record) bool {
		return other.Attachment != r.Attachment || other.Since != r.Since
	})
	if err != nil {
		return err
	}
	for _, g := range gone {
		d.log.Info("address released that no container of Docker has", logkey.Overlay, overlay, logkey.Addrs, g.Addrs)
	}
	return nil
}

// fileMissing files the addresses in use that no store knows, so that nobody
// else gets them. It reports whether all are in one now, under whatever name.
func (d *Docker) fileMissing(ctx context.Context, used inUse, filed map[netip.Addr]bool) (all bool, _ error) {
	var missing []netip.Addr
	for a := range used {
		if !filed[a] {
			missing = append(missing, a)
		}
	}
	if missing == nil {
		return true, nil
	}
	// What was released between the two looks is no longer in use.
	again, err := d.client.addresses(ctx)
	if err != nil {
		return false, err
	}
	state, err := d.driver.stores.state()
	if err != nil {
		return false, nil // without a lease nothing is given out to others either
	}
	slices.SortFunc(missing, netip.Addr.Compare)
	var errs []error
	all = true
	for _, a := range missing {
		who, ok := again[a]
		if !ok {
			continue
		}
		d.unnamed = true // what is known of it was asked before the record was made
		if err := d.file(ctx, state, a, who); err != nil {
			errs = append(errs, err)
			all = all && errors.As(err, new(*ipam.UnavailableError)) // somebody else's
		}
	}
	return all, errors.Join(errs...)
}

// file files one address that a container has. An address of no half of ours is
// left alone: it is of an earlier lease, and nobody gets it.
func (d *Docker) file(ctx context.Context, state conf.State, a netip.Addr, who user) error {
	o, ranges := ownerOf(state, a, who.network)
	i := slices.IndexFunc(ranges, func(p netip.Prefix) bool { return p.Contains(a) })
	if i < 0 {
		return nil
	}
	overlay := o.Info.Name
	_, err := d.driver.take(ctx, state, overlay, ipam.SingleRequest{
		Half: o.Info.Pool(conf.Docker), By: conf.Docker, Ranges: ranges, From: ranges[i], Want: a,
		Name: func(a netip.Addr) conf.Attachment { return conf.DockerAttachment(overlay, a) },
	})
	if err != nil {
		return fmt.Errorf("container %s uses an address of overlay %s that it was not given: %w", who.container, overlay, err)
	}
	d.log.Info("address of a container of Docker filed anew", logkey.Overlay, overlay, logkey.Addrs, a, logkey.Container, who.container)
	return nil
}

// ownerOf is the overlay whose address it is, and the ranges it is filed under.
func ownerOf(s conf.State, a netip.Addr, n *network) (conf.AgentOverlay, []netip.Prefix) {
	for _, o := range s.Overlays {
		ranges := o.Ranges(conf.Docker)
		if slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return o, ranges
		}
	}
	if o, ok := s.Overlay(n.IPAM.Options[overlayOption]); ok {
		for _, p := range n.subnets() {
			if isBystander(p) && len(halves(o)) > 0 {
				return o, rangesFor(o, p)
			}
		}
	}
	return conf.AgentOverlay{}, nil
}
