package etcd_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/store/etcd"
	"overlayd.internal/overlay/overlayd/internal/store/etcdtest"
)

var full = flag.Bool("full", false, "run long tests at full length")

const (
	linearAgents  = 40
	linearWorkers = 12
	// linearNetwork has few more subnets and VTEP addresses than there are agents,
	// so that what one gave back soon goes to another.
	linearNetwork = `{"vtep_subnet": "44.128.0.0/26", "vtep_mac_oui": "70:B3:D5:00:00:00",
		"overlays": [{"name": "dcos", "subnet": "9.0.0.0/18", "prefix": 24}]}`
)

// TestLinearizable: agents register, renew and are deleted at three coordinators
// on three members of etcd, while members and coordinators fail in every way
// there is. What everybody was answered must have one order: no subnet, VTEP
// address or MAC has two owners at any time, and no grant that was answered is
// lost.
func TestLinearizable(t *testing.T) {
	operations := 5_000
	if *full {
		operations = 100_000
	}
	c := etcdtest.New(t, 3, fmt.Sprint("--quota-backend-bytes=", quota), "--snapshot-count=1000")
	done := 0
	for round := 0; done < operations; round++ {
		// Each round has a history, and keys, of its own: what is unknown at the
		// end of one cannot come true in the next.
		l := &linear{t: t, cluster: c, prefix: fmt.Sprint("/linear/", round), began: time.Now()}
		l.run(min(operations-done, 5_000))
		done += len(l.history)
		if t.Failed() {
			return
		}
	}
	t.Logf("%d operations in all", done)
}

// run goes once through all faults, and on until there are enough operations.
func (l *linear) run(operations int) {
	for i := range l.coordinators {
		l.coordinators[i].Store(l.startCoordinator())
	}
	stop := make(chan struct{})
	var workers sync.WaitGroup
	for w := range linearWorkers {
		workers.Go(func() { l.work(w, stop) })
	}
	for _, f := range l.faults() {
		before, began := l.count(), time.Now()
		f.run()
		l.t.Logf("%s: %d operations in %s", f.name, l.count()-before, time.Since(began).Round(100*time.Millisecond))
	}
	eventually(l.t, "enough operations", func() bool { return l.count() >= operations })
	close(stop)
	workers.Wait()
	l.cluster.Wait()
	for i := range l.coordinators {
		l.coordinators[i].Load().kill()
	}
	l.coordinators[0].Store(l.startCoordinator())
	for agent := range linearAgents { // what was answered before is still so
		for deadline := time.Now().Add(patience); !l.register(linearWorkers, 0, agent); {
			if time.Now().After(deadline) {
				l.t.Fatalf("the last renewal of agent %d: %v", agent, l.lastError())
			}
		}
	}
	l.checkState()
	l.coordinators[0].Load().kill()
	l.check()
}

// linear is the history of one run.
type linear struct {
	t            *testing.T
	cluster      *etcdtest.Cluster
	prefix       string
	coordinators [3]atomic.Pointer[running]
	began        time.Time

	mu      sync.Mutex
	history []porcupine.Operation
	unknown int
	last    error // of an operation
}

// running is a coordinator with a store of its own.
type running struct {
	*coordinator.Coordinator
	kill func()
}

func (l *linear) startCoordinator() *running {
	var network conf.Network
	if err := json.Unmarshal([]byte(linearNetwork), &network); err != nil {
		l.t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	deadline := time.Now().Add(patience)
	for {
		c, s, err := func() (*coordinator.Coordinator, *etcd.Store, error) {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			s, err := etcd.Open(ctx, etcd.Options{Endpoints: l.cluster.Endpoints(), Prefix: l.prefix, Log: log})
			if err != nil {
				return nil, nil, err
			}
			c, err := coordinator.New(ctx, coordinator.Options{Network: network, Store: s, Log: log, Shared: true})
			if err != nil {
				return nil, nil, errors.Join(err, s.Close())
			}
			return c, s, nil
		}()
		if err != nil {
			if time.Now().After(deadline) {
				l.t.Error(err)
				return &running{kill: func() {}}
			}
			continue
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- c.Run(ctx) }()
		return &running{c, sync.OnceFunc(func() {
			_ = s.Close() // first, so that nothing is finished in peace
			cancel()
			<-ended
		})}
	}
}

// restartCoordinator kills one and starts it again.
func (l *linear) restartCoordinator(i int) {
	l.coordinators[i].Load().kill()
	l.coordinators[i].Store(l.startCoordinator())
}

// request is an operation; answer is what came of it.
type request struct {
	agent  int
	delete bool
}

type answer struct {
	unknown bool // it may or may not have been carried out, even later
	subnet  netip.Prefix
	vtep    netip.Addr
}

func (l *linear) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.history)
}

func (l *linear) lastError() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

func (l *linear) record(worker int, r request, a answer, call time.Duration) {
	back := time.Since(l.began)
	l.mu.Lock()
	defer l.mu.Unlock()
	if a.unknown {
		l.unknown++
		back = 1 << 60
		worker = linearWorkers + 1 + l.unknown // its operation never ends, it goes on under another name
	}
	l.history = append(l.history, porcupine.Operation{ClientId: worker, Input: r, Output: a, Call: int64(call), Return: int64(back)})
}

func (l *linear) work(worker int, stop <-chan struct{}) {
	random := rand.New(rand.NewPCG(uint64(worker), 7))
	pace := time.NewTicker(20 * time.Millisecond)
	defer pace.Stop()
	for {
		select {
		case <-stop:
			return
		case <-pace.C:
		}
		at, agent := random.IntN(len(l.coordinators)), random.IntN(linearAgents)
		if random.IntN(4) == 0 {
			l.delete(worker, at, agent)
		} else {
			l.register(worker, at, agent)
		}
	}
}

func linearID(agent int) string { return fmt.Sprintf("agent-%d", agent) }

// register reports whether it was answered.
func (l *linear) register(worker, at, agent int) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	c, call := l.coordinators[at].Load(), time.Since(l.began)
	lease, err := c.Register(ctx, api.RegisterRequest{AgentID: linearID(agent), AgentIP: netip.AddrFrom4([4]byte{172, 16, 0, byte(agent + 1)})})
	a := answer{unknown: err != nil}
	if err == nil {
		a.subnet, a.vtep = lease.Grants[0].Subnet, lease.VTEP.IP.Addr()
		if !a.subnet.IsValid() {
			l.t.Errorf("agent %d: %s", agent, lease.Grants[0].Error)
		}
	} else if refusal := (*api.Error)(nil); errors.As(err, &refusal) && refusal.Code != http.StatusServiceUnavailable {
		l.t.Errorf("agent %d is refused: %v", agent, err)
	}
	l.record(worker, request{agent: agent}, a, call)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = err
	return err == nil
}

func (l *linear) delete(worker, at, agent int) {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	c, call := l.coordinators[at].Load(), time.Since(l.began)
	_, err := c.Delete(ctx, []string{linearID(agent)})
	l.record(worker, request{agent: agent, delete: true}, answer{unknown: err != nil}, call)
}

// checkState compares what the last coordinator lists.
func (l *linear) checkState() {
	owners := map[string]string{}
	for _, a := range l.coordinators[0].Load().Agents() {
		for _, what := range []string{a.VTEP.IP.String(), a.VTEP.MAC.String(), a.Grants[0].Subnet.String()} {
			if other, taken := owners[what]; taken {
				l.t.Errorf("%s belongs to %s and %s", what, other, a.AgentID)
			}
			owners[what] = a.AgentID
		}
	}
}
