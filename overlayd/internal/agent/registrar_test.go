package agent

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/problems"
)

// scripted runs a registrar whose coordinator answers with the given function
// and returns when it asked, counted from the start.
func scripted(t *testing.T, runFor time.Duration, kicks []time.Duration, answer func(n int) (conf.Lease, error)) []time.Duration {
	t.Helper()
	var mu sync.Mutex
	var asked []time.Duration
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), runFor)
		defer cancel()
		r := &registrar{
			ask: func(context.Context, api.RegisterRequest) (conf.Lease, error) {
				mu.Lock()
				defer mu.Unlock()
				asked = append(asked, time.Since(start))
				return answer(len(asked))
			},
			find:   func(context.Context) (netip.Addr, error) { return addr("172.17.0.4"), nil },
			under:  func(netip.Addr, conf.Lease) conf.Underlay { return conf.Underlay{MTU: 1450} },
			req:    api.RegisterRequest{AgentID: "own"},
			held:   func() conf.Lease { return conf.Lease{} },
			moveOn: func() {},
			again:  func() {},
			boot:   boot{id: "this", now: func() time.Duration { return time.Since(start) }},
			timing: defaultTiming,
			kick:   make(chan struct{}, 1),
			out:    make(chan registration),
		}
		done := make(chan error)
		go func() { done <- r.run(ctx) }()
		for _, k := range kicks {
			time.AfterFunc(k, func() { kick(r.kick) })
		}
		for {
			select {
			case o := <-r.out:
				mu.Lock()
				if last := asked[len(asked)-1]; o.err == nil && o.sent.Boottime != last {
					t.Errorf("the term counts from %s, the request was sent at %s", o.sent.Boottime, last)
				}
				mu.Unlock()
			case err := <-done:
				if err != nil {
					t.Errorf("run: %v", err)
				}
				return
			}
		}
	})
	return asked
}

func TestRegistrarRenews(t *testing.T) {
	asked := scripted(t, time.Hour, nil, func(int) (conf.Lease, error) { return testLease(), nil })
	if asked[0] != 0 {
		t.Errorf("first registration after %s, want at once", asked[0])
	}
	spread := map[time.Duration]bool{}
	for i := 1; i < len(asked); i++ {
		gap := asked[i] - asked[i-1]
		spread[gap] = true
		if gap < 24*time.Second || gap > 36*time.Second {
			t.Errorf("renewal %d after %s, want 30s give or take a fifth", i, gap)
		}
	}
	if len(asked) < 90 || len(spread) < 50 {
		t.Errorf("%d renewals in an hour with %d different pauses, want about 120 with jitter", len(asked), len(spread))
	}
}

func TestRegistrarRenewsShortTerms(t *testing.T) {
	short := testLease()
	short.TermSeconds = 30
	asked := scripted(t, time.Minute, nil, func(int) (conf.Lease, error) { return short, nil })
	for i := 1; i < len(asked); i++ {
		if gap := asked[i] - asked[i-1]; gap > 12*time.Second {
			t.Errorf("renewal %d after %s, want a third of the term of 30s", i, gap)
		}
	}
}

// Unreachable: tries come quickly at first and never more than 15 s apart.
func TestRegistrarBacksOff(t *testing.T) {
	asked := scripted(t, 10*time.Minute, nil, func(int) (conf.Lease, error) { return conf.Lease{}, errors.New("connection refused") })
	ceiling := 200 * time.Millisecond
	for i := 1; i < len(asked); i++ {
		if gap := asked[i] - asked[i-1]; gap > ceiling+1 {
			t.Errorf("try %d after %s, want at most %s", i, gap, ceiling)
		}
		ceiling = min(2*ceiling, 15*time.Second)
	}
	if len(asked) < 40 || len(asked) > 200 {
		t.Errorf("%d tries in 10 minutes, want about 85", len(asked))
	}
}

// A coordinator that said no is not asked quickly.
func TestRegistrarRefused(t *testing.T) {
	for _, code := range []int{http.StatusConflict, http.StatusInsufficientStorage} {
		asked := scripted(t, 10*time.Minute, nil, func(int) (conf.Lease, error) {
			return conf.Lease{}, &api.Error{Code: code, Message: "all VTEP addresses are leased"}
		})
		for i := 1; i < len(asked); i++ {
			if gap := asked[i] - asked[i-1]; gap < 12*time.Second || gap > 18*time.Second {
				t.Errorf("code %d: try %d after %s, want 15s give or take a fifth", code, i, gap)
			}
		}
	}
}

func TestRegistrarKicked(t *testing.T) {
	asked := scripted(t, 20*time.Second, []time.Duration{5 * time.Second, 5*time.Second + time.Millisecond}, func(int) (conf.Lease, error) { return testLease(), nil })
	want := []time.Duration{0, 5 * time.Second, 5*time.Second + 200*time.Millisecond}
	if len(asked) != len(want) {
		t.Fatalf("asked at %v, want %v", asked, want)
	}
	for i := range want {
		if asked[i] != want[i] {
			t.Errorf("asked at %v, want %v", asked, want)
		}
	}
}

// A lease that cannot be applied is a failure like any other.
func TestRegistrarChecksLease(t *testing.T) {
	asked := scripted(t, time.Second, nil, func(n int) (conf.Lease, error) {
		l := testLease()
		if n == 1 {
			l.AgentID = "somebody else"
		}
		return l, nil
	})
	if len(asked) != 2 || asked[1] > 200*time.Millisecond {
		t.Errorf("asked at %v, want a second try soon", asked)
	}
}

func TestReporterSendsTheNewest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var log bytes.Buffer
		var mu sync.Mutex // guards what follows
		var taken []string
		up := false
		register := make(chan struct{}, 1)
		r := &reporter{
			send: func(_ context.Context, s api.StatusReport) error {
				mu.Lock()
				defer mu.Unlock()
				if !up {
					return &api.Error{Code: http.StatusNotFound, Message: "unknown agent"}
				}
				taken = append(taken, s.AgentID)
				return nil
			},
			timing: defaultTiming, problems: problems.New(slog.New(slog.NewTextHandler(&log, nil))),
			in: make(chan api.StatusReport, 1), register: register,
		}
		done := make(chan error)
		go func() { done <- r.run(ctx) }()
		replace(r.in, api.StatusReport{AgentID: "first"})
		time.Sleep(time.Minute) // the bubble's clock
		replace(r.in, api.StatusReport{AgentID: "second"})
		synctest.Wait()
		replace(r.in, api.StatusReport{AgentID: "third"})
		time.Sleep(time.Minute)
		mu.Lock()
		up = true
		mu.Unlock()
		time.Sleep(time.Minute)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if len(taken) != 1 || taken[0] != "third" {
			t.Errorf("reports taken: %v, want the third, once", taken)
		}
		if n := strings.Count(log.String(), "\n"); n != 2 {
			t.Errorf("%d lines logged, want one for the beginning and one for the end:\n%s", n, &log)
		}
		select {
		case <-register:
		default:
			t.Error("a refused report does not lead to a registration")
		}
	})
}
