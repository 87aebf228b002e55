//go:build engines

package engines

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"
)

// each is how many containers every runtime has on every host in TestTogether.
const each = 20

// TestTogether lets all runtimes launch containers on the same two hosts at the
// same time: no address is given out twice, everybody is reached from the other
// host, and nothing is left when they are gone.
func TestTogether(t *testing.T) {
	ctx, c := newCluster(t)
	var engines []Engine // of h1, h2, h1, ...
	var names []string
	for _, r := range launchers() {
		for _, h := range c.Hosts {
			e := r.on(h)
			if err := e.Start(ctx); err != nil {
				t.Fatal(err)
			}
			engines = append(engines, e)
			names = append(names, r.name+"-"+h.Name)
		}
	}

	containers := make([][]*Container, len(engines))
	parallel(t, ctx, len(engines), func(ctx context.Context, i int) error {
		for n := range each {
			k, err := engines[i].Run(ctx, Spec{Name: fmt.Sprintf("%s-%d", names[i], n), Network: Both})
			if err != nil {
				return err
			}
			containers[i] = append(containers[i], k)
		}
		return nil
	})

	owner := map[netip.Addr]string{}
	for _, ks := range containers {
		for _, k := range ks {
			if len(k.IPs) != 2 {
				t.Errorf("%s has the addresses %s, want one of each family", k.Name, k.IPs)
			}
			for _, ip := range k.IPs {
				if owner[ip] != "" {
					t.Errorf("%s and %s have the address %s", k.Name, owner[ip], ip)
				}
				owner[ip] = k.Name
			}
		}
	}
	for i, h := range c.Hosts {
		attachments, err := c.Attachments(ctx, h)
		addrs := 0 // two of each container; Docker files each by itself
		for _, a := range attachments {
			addrs += len(a.Addrs)
		}
		if want := each * len(engines); err != nil || addrs != want {
			t.Errorf("overlayctl lists %d addresses in use on %s, %v; want %d", addrs, c.Hosts[i].Name, err, want)
		}
	}

	// Every one fetches the page of the one with its number on the other host,
	// launched by the same runtime.
	parallel(t, ctx, len(engines), func(ctx context.Context, i int) error {
		for n, from := range containers[i] {
			to := containers[i^1][n]
			for _, ip := range to.IPs {
				if err := from.Ping(ctx, ip); err != nil {
					return fmt.Errorf("%s pings %s: %w", from.Name, to.Name, err)
				}
				if page, err := from.Get(ctx, netip.AddrPortFrom(ip, 80)); err != nil || page != to.Name {
					return fmt.Errorf("%s fetches from %s: page %q, %w", from.Name, to.Name, page, err)
				}
			}
		}
		return nil
	})

	parallel(t, ctx, len(engines), func(ctx context.Context, i int) error {
		for _, k := range containers[i] {
			if err := k.Remove(ctx); err != nil {
				return err
			}
		}
		return nil
	})
	for _, h := range c.Hosts {
		nothingLeft(t, ctx, c, h)
	}
}

// parallel runs do for 0 to n-1 at the same time and fails the test with every
// error.
func parallel(t *testing.T, ctx context.Context, n int, do func(context.Context, int) error) {
	t.Helper()
	var mu sync.Mutex
	failed := false
	var g errgroup.Group
	for i := range n {
		g.Go(func() error {
			if err := do(ctx, i); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = true
				t.Error(err)
			}
			return nil
		})
	}
	g.Wait()
	if failed {
		t.FailNow()
	}
}
