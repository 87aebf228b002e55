package datapath

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"overlayd.internal/overlay/internal/firewall/foreign"
	"overlayd.internal/overlay/internal/netns"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// othersPause is the least time between two looks at the rules of others: they
// take a few programs.
const othersPause = 5 * time.Second

// othersDelay is how long a look waits while the peers of the host are still to
// come: it would take the processors from what routes them.
const othersDelay = time.Second

// othersPatience bounds a look.
const othersPatience = 20 * time.Second

// others looks at the rules of others, on a goroutine of its own: the programs
// that it asks may take seconds, and a repair is not to wait for them.
type others struct {
	ns   netns.NS
	news chan<- struct{} // of capacity 1: another result
	ctx  context.Context // of all looks
	stop context.CancelFunc
	done sync.WaitGroup

	mu      sync.Mutex // guards what follows
	host    foreign.Host
	asked   bool // for a look, since the last one began
	looking bool
	found   []string
}

func newOthers(news chan<- struct{}) (*others, error) {
	ns, err := netns.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	o := &others{ns: ns, news: news}
	o.ctx, o.stop = context.WithCancel(context.Background())
	return o, nil
}

func (o *others) close() {
	o.stop()
	o.done.Wait()
	o.ns.Close()
}

// look asks for a look at the rules of others that stop packets of the overlays,
// and returns what the last one found. What is accepted by one table of rules can
// be dropped by another, so nothing but them can mend it.
func (o *others) look(w plan.Wanted) []string {
	host := foreign.Host{Underlay4: w.VTEP.Local.Is4() || w.VTEP.Second.Is4(), Underlay6: w.VTEP.Local.Is6() || w.VTEP.Second.Is6()}
	for _, dev := range w.Devices() {
		host.Devices = append(host.Devices, dev.Name)
	}
	for _, overlay := range w.Overlays {
		host.Subnets = append(host.Subnets, overlay.Subnets...)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.host = host
	if len(w.Overlays) == 0 {
		o.found = nil
		return nil
	}
	o.asked = true
	if !o.looking && o.ctx.Err() == nil {
		o.looking = true
		var delay time.Duration
		if w.Partial {
			delay = othersDelay
		}
		o.done.Go(func() {
			o.pause(delay)
			o.run()
		})
	}
	return o.found
}

// known is what the last look found.
func (o *others) known() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.found
}

// run looks for as long as somebody asks.
func (o *others) run() {
	for o.takeUp() {
		rules, err := o.read()
		if o.ctx.Err() == nil {
			o.take(rules, err)
		}
		o.pause(othersPause)
	}
}

// pause waits that long, or until looking ends.
func (o *others) pause(d time.Duration) {
	select {
	case <-o.ctx.Done():
	case <-time.After(d):
	}
}

// takeUp reports whether a look was asked for; if not, looking ends.
func (o *others) takeUp() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.looking = o.asked && o.ctx.Err() == nil
	o.asked = false
	return o.looking
}

// read reads the rules of the namespace in which we were made.
func (o *others) read() (r foreign.Rules, err error) {
	ctx, cancel := context.WithTimeout(o.ctx, othersPatience)
	defer cancel()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own := fmt.Sprintf("/proc/self/fd/%d", o.ns.FD)
	if netns.Same(own, "/proc/thread-self/ns/net") { // always in a daemon, which may not be allowed to enter one
		return foreign.Read(ctx), nil
	}
	err = o.ns.Inside(func() error { r = foreign.Read(ctx); return nil })
	return r, err
}

// take remembers what was found, and announces it where it is something else.
func (o *others) take(rules foreign.Rules, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	var found []string
	if err := errors.Join(err, rules.Err); err != nil {
		found = append(found, "the rules of others cannot be looked at: "+err.Error())
	}
	for _, f := range rules.All(o.host) {
		found = append(found, f.String())
	}
	if len(o.host.Subnets) == 0 {
		found = nil
	}
	if slices.Equal(found, o.found) {
		return
	}
	o.found = found
	select {
	case o.news <- struct{}{}:
	default:
	}
}
