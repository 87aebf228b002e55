package firewalld

import (
	"context"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

// again is the time between two tries to reach the bus.
const again = 10 * time.Second

// Keeper tells firewalld what to let through, on a goroutine of its own: firewalld
// answers nobody while it starts or reloads, and nothing else may wait for it. It
// listens to the bus, so that firewalld is told the moment that it answers again.
type Keeper struct {
	client Client
	news   chan<- struct{}
	kick   chan struct{}

	mu      sync.Mutex
	want    *Traffic // nil: nobody said so yet
	changed int      // since Want was asked
	err     error    // of the last try
}

// NewKeeper announces on news, of capacity 1, that something was changed, or
// failed, or no longer fails.
func NewKeeper(address string, news chan<- struct{}) *Keeper {
	return &Keeper{client: Client{Address: address}, news: news, kick: make(chan struct{}, 1)}
}

// Want says what is to be let through, nothing where there are no devices. It
// returns how much was changed since it was called last and what went wrong, as
// far as that is known; what comes of this call is announced.
func (k *Keeper) Want(t Traffic) (changed int, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.want = &t
	changed, k.changed = k.changed, 0
	signal(k.kick)
	return changed, k.err
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
				k.tell(ctx)
			}
		}
	}
}

// subscribe asks for the signals of firewalld's start and reload; nil: no bus.
func (k *Keeper) subscribe(ctx context.Context, to chan *dbus.Signal) *dbus.Conn {
	conn := k.client.connect(ctx)
	if conn == nil {
		return nil
	}
	err := conn.AddMatchSignalContext(ctx, dbus.WithMatchInterface("org.freedesktop.DBus"), dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, name))
	if err == nil {
		err = conn.AddMatchSignalContext(ctx, dbus.WithMatchInterface(name), dbus.WithMatchMember("Reloaded"))
	}
	if err != nil {
		conn.Close()
		return nil
	}
	conn.Signal(to)
	return conn
}

// concerns reports whether a signal says that firewalld forgot what it was told,
// or went.
func concerns(s *dbus.Signal) bool {
	return s.Name == "org.freedesktop.DBus.NameOwnerChanged" || s.Name == name+".Reloaded"
}

// tell makes firewalld let through what is wanted.
func (k *Keeper) tell(ctx context.Context) {
	k.mu.Lock()
	want := k.want
	k.mu.Unlock()
	if want == nil {
		return
	}
	var changed int
	var err error
	if len(want.Devices) == 0 {
		changed, err = k.client.Remove(ctx, want.Underlay)
	} else {
		changed, err = k.client.Ensure(ctx, *want)
	}
	if ctx.Err() != nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if changed > 0 || text(err) != text(k.err) {
		signal(k.news)
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
