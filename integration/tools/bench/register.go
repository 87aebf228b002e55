package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"overlayd.internal/overlay/integration/lab"
)

// register asks the coordinator for the lease of a simulated agent.
func register(ctx context.Context, client *http.Client, url string, n int) error {
	ip := netip.AddrFrom4([4]byte{172, 20, byte(n >> 8), byte(n)})
	if n > 0xffff {
		ip = netip.AddrFrom4([4]byte{172, 21, byte(n >> 8), byte(n)})
	}
	body, err := json.Marshal(map[string]any{
		"agent_id": fmt.Sprintf("sim-%06d", n), "agent_ip": ip, "bridges": []string{"mesos", "docker"}, "version": "bench",
	})
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/v1/register", bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("register agent %d: %s: %s", n, resp.Status, answer)
	}
	return nil
}

// clientIn makes connections from inside a namespace and keeps them open.
func clientIn(node *lab.Node, conns int) *http.Client {
	return &http.Client{
		Timeout: 60 * time.Second,
		Transport: &http.Transport{
			MaxIdleConnsPerHost: conns, MaxConnsPerHost: conns,
			DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
				to, err := netip.ParseAddrPort(addr)
				if err != nil {
					return nil, err
				}
				return node.Dial(ctx, to)
			},
		},
	}
}

// registerMany registers agents from..to and returns how long each waited.
func registerMany(ctx context.Context, client *http.Client, url string, from, to, workers int) ([]float64, error) {
	waits := make([]float64, to-from)
	var next atomic.Int64
	next.Store(int64(from))
	g, ctx := errgroup.WithContext(ctx)
	for range workers {
		g.Go(func() error {
			for {
				n := int(next.Add(1)) - 1
				if n >= to || ctx.Err() != nil {
					return ctx.Err()
				}
				start := time.Now()
				if err := register(ctx, client, url, n); err != nil {
					return err
				}
				waits[n-from] = ms(time.Since(start))
			}
		})
	}
	return waits, g.Wait()
}
