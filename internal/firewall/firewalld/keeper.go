package firewalld

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

// again is the time between two tries to reach the bus.
const again = 10 * time.Second

// Keeper tells firewalld what to let through, on a goroutine of its own: firewalld
// answers nobody while it starts or reloads, and nothing else may wait for it. It
// listens to the bus, so that firewalld is told the moment that it answers again.
//
// A start and a reload of firewalld may take our own rules away, so that sources
// wait until these have been set once more after it: see Round.
type Keeper struct {
	client   Client
	news     chan<- struct{}
	kick     chan struct{}
	patience time.Duration // with a bus that does not answer

	mu      sync.Mutex
	want    *Traffic // nil: nobody said so yet
	former  map[netip.Prefix]struct{}
	round   Round // begins when firewalld has answered after a start or reload
	set     Round // that of want
	forgot  bool  // firewalld started or reloaded, and has not answered since
	changed int   // since Want was asked
	err     error // of the last try
}

// NewKeeper announces on news, of capacity 1, that something was changed, or
// failed, or no longer fails.
func NewKeeper(address string, news chan<- struct{}) *Keeper {
	return &Keeper{client: Client{Address: address}, news: news, kick: make(chan struct{}, 1), patience: timeout, round: 1, former: map[netip.Prefix]struct{}{}}
}

// Round is a time in which firewalld neither started nor reloaded. The zero value
// is none.
type Round int

// Round is the present one. Whoever sets the rules asks for it before.
func (k *Keeper) Round() Round {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.round
}

// Want says what is to be let through, nothing where there are no devices. set is
// the round that our own rules were set in, zero where that failed: sources are
// told in the same one only, and a new one is announced to who wants some. Want
// returns how much was changed since it was called last and what went wrong, as
// far as that is known; what comes of this call is announced.
func (k *Keeper) Want(t Traffic, set Round) (changed int, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	former := t.Former
	if k.want != nil {
		former = append(slices.Clip(former), k.want.Sources...)
	}
	for _, s := range former {
		k.former[s] = struct{}{}
	}
	for _, s := range t.Sources {
		delete(k.former, s)
	}
	t.Former = slices.Collect(maps.Keys(k.former))
	k.want, k.set = &t, set
	changed, k.changed = k.changed, 0
	signal(k.kick)
	return changed, k.err
}

// Formerly names sources that an earlier process may have asked for. Those that are not
// wanted are taken out of a zone of others, where they would stay until firewalld
// reloads. It is called before the first Want.
func (k *Keeper) Formerly(sources []netip.Prefix) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range sources {
		k.former[s.Masked()] = struct{}{}
	}
}

// Run works until ctx is done, in the network namespace of the calling thread,
// and returns nil.
func (k *Keeper) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		k.listen(ctx)
	}
	return nil
}

// listen keeps firewalld told while the bus is there.
func (k *Keeper) listen(ctx context.Context) {
	signals := make(chan *dbus.Signal, 16)
	var retry <-chan time.Time
	if conn := k.subscribe(ctx, signals); conn != nil {
		defer conn.Close()
		k.forget(ctx) // it may have started since the last try
	} else {
		timer := time.NewTimer(again)
		defer timer.Stop()
		retry = timer.C
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-retry:
			return
		case <-k.kick:
			k.tell(ctx)
			if retry != nil {
				return
			}
		case s, ok := <-signals:
			if !ok {
				return // the bus has ended
			}
			if concerns(s) {
				k.forget(ctx)
			}
		}
	}
}

// subscribe asks for the signals of firewalld's start and reload; nil: no bus, or
// one that does not answer.
func (k *Keeper) subscribe(ctx context.Context, to chan *dbus.Signal) *dbus.Conn {
	// The connection ends with its context, so that this one has no deadline.
	ctx, cancel := context.WithCancel(ctx)
	timer := time.AfterFunc(k.patience, cancel)
	conn := k.client.connect(ctx)
	if conn == nil {
		timer.Stop()
		cancel()
		return nil
	}
	err := conn.AddMatchSignalContext(ctx, dbus.WithMatchInterface("org.freedesktop.DBus"), dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, name))
	if err == nil {
		err = conn.AddMatchSignalContext(ctx, dbus.WithMatchInterface(name), dbus.WithMatchMember("Reloaded"))
	}
	if !timer.Stop() || err != nil {
		cancel()
		conn.Close()
		return nil
	}
	context.AfterFunc(conn.Context(), cancel)
	conn.Signal(to)
	return conn
}

// concerns reports whether a signal says that firewalld forgot what it was told,
// or went.
func concerns(s *dbus.Signal) bool {
	return s.Name == "org.freedesktop.DBus.NameOwnerChanged" || s.Name == name+".Reloaded"
}

// forget tells a firewalld that knows nothing of what it was told at run time.
func (k *Keeper) forget(ctx context.Context) {
	k.mu.Lock()
	k.forgot = true
	k.mu.Unlock()
	k.tell(ctx)
}

// tell makes firewalld let through what is wanted.
func (k *Keeper) tell(ctx context.Context) {
	k.mu.Lock()
	if k.want == nil {
		k.mu.Unlock()
		return
	}
	want := *k.want
	want.withhold = len(want.Sources) > 0 && (k.forgot || k.set != k.round)
	k.mu.Unlock()
	var changed int
	var err error
	if len(want.Devices) == 0 {
		changed, err = k.client.Remove(ctx, want.Underlay)
	} else {
		changed, err = k.client.Ensure(ctx, want)
	}
	if ctx.Err() != nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if changed > 0 || text(err) != text(k.err) {
		signal(k.news)
	}
	if k.forgot && err == nil {
		// It answers, so that what it takes away it has taken.
		k.forgot, k.round = false, k.round+1
		if len(want.Sources) > 0 {
			signal(k.news)
		}
	}
	k.changed, k.err = k.changed+changed, err
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// signal wakes whoever waits on a channel of capacity 1.
func signal(ch chan<- struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
