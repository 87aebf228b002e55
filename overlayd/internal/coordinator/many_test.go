package coordinator_test

import (
	"flag"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// TestThousandJoin: a thousand hosts join over TLS with one token, each with a
// key, a certificate and connections of its own, and lease. A power cut that all
// come back from is no worse: they have their certificates then. And they renew.
func TestThousandJoin(t *testing.T) {
	const hosts, limit = 1000, time.Minute
	n := secure(t)
	token := n.token(t, api.TokenRequest{Uses: hosts})
	members := make([]*person, hosts)
	for i := range members {
		members[i] = n.join(t, fmt.Sprintf("agent-%d", i), token)
	}
	round := func(what string) {
		start := time.Now()
		var all sync.WaitGroup
		turn := make(chan struct{}, 64*runtime.NumCPU())
		for i, m := range members {
			all.Go(func() {
				turn <- struct{}{}
				defer func() { <-turn }()
				_, err := m.Register(t.Context(), api.RegisterRequest{
					AgentID: fmt.Sprintf("agent-%d", i), AgentIP: netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}), Bridges: conf.Halves[:],
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		took := time.Since(start)
		if took > limit {
			t.Errorf("%s: %v, want at most %v", what, took, limit)
		}
		t.Logf("%s: %d hosts in %v", what, hosts, took.Round(time.Millisecond))
	}
	round("join and lease")
	for _, m := range members {
		m.CloseIdleConnections()
	}
	round("come back")
	renewAll(t, members)
}

var atFullLength = flag.Bool("full", false, "renew for ten minutes, as the runs that are too long for CI do")

// renewAll has a thousand hosts with identities renew all the time, each every five
// seconds. They and the coordinator together take less than a core, and hardly
// anybody waits.
func renewAll(t *testing.T, members []*person) {
	const every, limit = 5 * time.Second, 50 * time.Millisecond
	hosts, rounds := len(members), 2
	if *atFullLength {
		rounds = int(10 * time.Minute / every)
	}
	leases := make([]conf.Lease, hosts)
	renew := func(i int) (lease conf.Lease, err error) {
		return members[i].Register(t.Context(), api.RegisterRequest{
			AgentID: fmt.Sprintf("agent-%d", i), AgentIP: netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}), Bridges: conf.Halves[:],
		})
	}
	for i := range members {
		var err error
		if leases[i], err = renew(i); err != nil {
			t.Fatal(err)
		}
	}
	var before syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &before); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	waits := make([][]time.Duration, hosts)
	var all sync.WaitGroup
	for i := range members {
		all.Go(func() {
			// Spread over the time, as hosts are that came one by one.
			tick := time.NewTimer(time.Duration(i) * every / time.Duration(hosts))
			defer tick.Stop()
			for range rounds {
				<-tick.C
				tick.Reset(every)
				asked := time.Now()
				now, err := renew(i)
				if err != nil {
					t.Error(err)
					return
				}
				waits[i] = append(waits[i], time.Since(asked))
				if was := leases[i]; now.Epoch != was.Epoch || now.VTEP != was.VTEP {
					t.Errorf("agent-%d had %+v and has %+v", i, was.VTEP, now.VTEP)
				}
			}
		})
	}
	all.Wait()
	took := time.Since(began)
	var after syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &after); err != nil {
		t.Fatal(err)
	}
	cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	sorted := slices.Sorted(slices.Values(slices.Concat(waits...)))
	p50, p99 := sorted[len(sorted)/2], sorted[len(sorted)*99/100]
	t.Logf("%d renewals in %v: p50 %v, p99 %v, %.2f cores for hosts and coordinator", len(sorted), took.Round(time.Second), p50, p99, cpu.Seconds()/took.Seconds())
	if *atFullLength && p99 > limit {
		t.Errorf("p99 of a renewal %v, want at most %v", p99, limit)
	}
	if cpu > took {
		t.Errorf("%v of CPU in %v, want less than a core", cpu, took)
	}
}
