package docker

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/published"
	"overlayd.internal/overlay/internal/conntrack"
	"overlayd.internal/overlay/ipam"
)

// How long dockerd may take to say whether an address that it asks for again is
// in use. It is waiting for the driver, and asks for one address after the other
// while it starts: then it is not to wait for each.
const (
	probeTime      = 5 * time.Second        // of a dockerd that is there
	probeStartTime = 300 * time.Millisecond // of one that may be starting
	probePause     = 3 * time.Second        // between two of those
)

// How long a request waits for an agent that has just started, and how often it
// looks.
const (
	patience  = 15 * time.Second
	pollPause = 50 * time.Millisecond

	// roomPatience is how long one that finds nothing left waits for the further
	// block that the agent is about to get.
	roomPatience = 5 * time.Second
)

type addressRequest struct {
	PoolID  string
	Address string // empty: ours to choose
	Options map[string]string
}

type addressAnswer struct {
	Address string // with the pool's length
	Data    map[string]string
}

func (d *driver) requestAddress(ctx context.Context, r addressRequest) (any, error) {
	p, err := parsePool(r.PoolID)
	if err != nil {
		return nil, err
	}
	var want netip.Addr
	if r.Address != "" {
		all, err := conf.ParseAddrs([]string{r.Address})
		if err != nil {
			return nil, err
		}
		want = all[0]
	}
	answer := func(a netip.Addr) (any, error) {
		return addressAnswer{Address: withGateway(a, p.prefix).String(), Data: map[string]string{}}, nil
	}
	if r.Options[typeOption] == gatewayType {
		// The host has it, on the bridge, for ever.
		gateway := conf.Gateway(p.prefix)
		if want.IsValid() && want != gateway {
			return nil, fmt.Errorf("gateway %s: that of %s is %s in every overlay; give that one, or none", want, p.prefix, gateway)
		}
		return answer(gateway)
	}
	got, err := d.allocate(ctx, p, want)
	if err != nil {
		return nil, err
	}
	return answer(got)
}

// withGateway is an address with the length of the pool, or, if it is of a further
// block, with a length that has the network's gateway on the link as well: dockerd
// gives all containers of a network the same gateway. The bridge answers for what
// else is in such a range.
func withGateway(a netip.Addr, pool netip.Prefix) netip.Prefix {
	bits := pool.Bits()
	for bits > 0 && !netip.PrefixFrom(pool.Addr(), bits).Contains(a) {
		bits--
	}
	return netip.PrefixFrom(a, bits)
}

// allocate takes an address of the pool.
func (d *driver) allocate(ctx context.Context, p pool, want netip.Addr) (netip.Addr, error) {
	state, o, err := d.ready(ctx, p)
	if err != nil {
		return netip.Addr{}, err
	}
	if err := published.Drained(o); err != nil {
		if d.confirm(ctx, p.overlay, want) {
			return want, nil
		}
		return netip.Addr{}, err
	}
	r := ipam.SingleRequest{
		Half: o.Info.Pool(conf.Docker), By: conf.Docker, Ranges: rangesFor(o, p.prefix), From: p.from(), Want: want,
		Name: func(a netip.Addr) conf.Attachment { return conf.DockerAttachment(p.overlay, a) },
	}
	if who, inUse := d.unfiledUser(ctx, p.overlay, r); inUse {
		return netip.Addr{}, &ipam.UnavailableError{Addr: want, Reason: "is in use by container " + who.container + " of Docker"}
	}
	got, err := d.take(ctx, state, p.overlay, r)
	var asked time.Time
	for until := time.Now().Add(roomPatience); ctx.Err() == nil && time.Now().Before(until); {
		unfiled := errors.Is(err, ipam.ErrUnfiled)
		if !unfiled && (!lacksAddresses(err) || p.part.IsValid() || p.prefix.Addr().Is6() || !published.HasRoom(state, p.overlay)) {
			break
		}
		if unfiled && time.Since(asked) > time.Second {
			asked = time.Now()
			d.unfiled()
		}
		sleep(ctx, pollPause)
		var readyErr error
		if state, o, readyErr = d.ready(ctx, p); readyErr != nil {
			return netip.Addr{}, readyErr
		}
		if ranges := rangesFor(o, p.prefix); unfiled || !slices.Equal(ranges, r.Ranges) {
			r.Ranges = ranges
			got, err = d.take(ctx, state, p.overlay, r)
		}
	}
	if refused := new(*ipam.UnavailableError); errors.As(err, refused) && d.confirm(ctx, p.overlay, want) {
		return want, nil
	}
	if lacksAddresses(err) && p.prefix.Addr().Is6() && len(o.Blocks) > 0 {
		err = fmt.Errorf("%w; Docker has IPv6 addresses of the first subnet of an overlay alone, whatever further ones this host has (ADR 0039)", err)
	}
	if err != nil {
		return netip.Addr{}, err
	}
	if err := conntrack.Forget(got.Flush); err != nil {
		return netip.Addr{}, errors.Join(err, d.release(ctx, p.overlay, got.Addrs[0]))
	}
	return got.Addrs[0], nil
}

func (d *driver) take(ctx context.Context, state conf.State, overlay string, r ipam.SingleRequest) (ipam.Allocation, error) {
	s, err := d.stores.open(ctx, overlay, cooling(state))
	if err != nil {
		return ipam.Allocation{}, err
	}
	defer s.Close()
	got, err := s.AllocateSingle(ctx, r)
	if exhausted := new(*ipam.ExhaustedError); errors.As(err, exhausted) && r.Half != r.By {
		(*exhausted).Half = conf.SharedPool
	}
	return got, err
}

// unfiledUser is who of Docker has an address that is asked for by name, while the store
// does not know yet what Docker has. A dockerd that starts asks for what its containers
// have, and one that does not answer is starting, or gone.
func (d *driver) unfiledUser(ctx context.Context, overlay string, r ipam.SingleRequest) (who user, inUse bool) {
	d.mu.Lock()
	up := d.up
	d.mu.Unlock()
	if !up || !r.Want.IsValid() {
		return user{}, false
	}
	pools, err := d.unfiledOf(ctx, overlay)
	if err != nil || !slices.Contains(pools, r.Half) {
		return user{}, false // the store says itself what is wrong with it
	}
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	used, err := d.client.addresses(ctx)
	if err != nil {
		return user{}, false
	}
	who, inUse = used[r.Want]
	return who, inUse
}

// unfiledOf are the pools of an overlay's store that wait for Docker's addresses.
func (d *driver) unfiledOf(ctx context.Context, overlay string) ([]conf.Half, error) {
	s, err := d.stores.read(ctx, overlay)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return s.Unfiled(ctx)
}

// ready is what is published, and the pool's overlay in it. When a host boots,
// dockerd starts its containers once, and the agent may not have published yet:
// after its own start the driver waits for that.
func (d *driver) ready(ctx context.Context, p pool) (conf.State, conf.AgentOverlay, error) {
	for {
		state, err := d.stores.state()
		var o conf.AgentOverlay
		if err == nil {
			o, err = usable(state, p)
		}
		if err == nil || ctx.Err() != nil || time.Since(d.started) > d.patience {
			return state, o, err
		}
		sleep(ctx, pollPause)
	}
}

// usable is the pool's overlay if containers can be attached to it.
func usable(s conf.State, p pool) (conf.AgentOverlay, error) {
	o, ok := s.Overlay(p.overlay)
	if !ok || len(halves(o)) == 0 {
		return o, fmt.Errorf("overlay %s has no Docker half on this host any more", p.overlay)
	}
	if !slices.Contains(halves(o), p.prefix) && !isBystander(p.prefix) {
		return o, fmt.Errorf("the network was made for %s, and overlay %s has %s on this host now; detach its containers and remove it, the agent makes it anew",
			p.prefix, p.overlay, join(halves(o)))
	}
	if st := o.State; st != nil && st.Status != conf.StatusOK {
		why := st.Error
		if why == "" {
			why = "the agent is still setting it up"
		}
		return o, fmt.Errorf("overlay %s is not ready on this host: %s", p.overlay, why)
	}
	return o, nil
}

// confirm reports whether an address that Docker asks for by name is one that it
// has already, by our books, without a container that uses it: it was killed
// before it could give it back. While dockerd starts it cannot be asked; then
// each address is confirmed once, because starting is when it asks again for
// what its containers have.
func (d *driver) confirm(ctx context.Context, overlay string, a netip.Addr) bool {
	if !a.IsValid() || !d.holds(ctx, overlay, a) {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.up || time.Since(d.silent) > probePause {
		limit := probeStartTime
		if d.up {
			limit = probeTime
		}
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		used, err := d.client.addresses(ctx)
		if err == nil {
			_, inUse := used[a]
			return !inUse
		}
		if d.up {
			return false
		}
		d.silent = time.Now()
	}
	key := conf.DockerAttachment(overlay, a)
	first := !d.granted[key]
	d.granted[key] = true
	return first
}

// holds reports whether an address is one that Docker has.
func (d *driver) holds(ctx context.Context, overlay string, a netip.Addr) bool {
	s, err := d.stores.read(ctx, overlay)
	if err != nil {
		return false
	}
	defer s.Close()
	_, found, err := s.Get(ctx, conf.DockerAttachment(overlay, a))
	return err == nil && found
}

func (d *driver) releaseAddress(ctx context.Context, r addressRequest) (any, error) {
	p, err := parsePool(r.PoolID)
	if err != nil {
		return nil, err
	}
	all, err := conf.ParseAddrs([]string{r.Address})
	if err != nil {
		return nil, err
	}
	return struct{}{}, d.release(ctx, p.overlay, all[0])
}

// release gives an address back; the gateway, and what was never given out, is
// no error.
func (d *driver) release(ctx context.Context, overlay string, a netip.Addr) error {
	if !d.stores.exists(overlay) {
		return nil
	}
	s, err := d.stores.open(ctx, overlay, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	_, err = s.Release(ctx, conf.DockerAttachment(overlay, a))
	return err
}

// lacksAddresses reports whether a further block would help: the addresses are used
// up, and not the ports of the bridge.
func lacksAddresses(err error) bool {
	exhausted := new(*ipam.ExhaustedError)
	return errors.As(err, exhausted) && !(*exhausted).Stats.PortLimited()
}
