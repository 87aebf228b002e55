package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// serveFast starts what answers in every server.
func (c *config) serveFast(all []*route) (stop func(), err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	var procs []*lab.Proc
	stop = func() {
		for _, p := range procs {
			p.Kill()
		}
	}
	for _, v := range all {
		for _, argv := range [][]string{
			{"iperf3", "-s"},
			{"taskset", "-c", "0", self, "-pong", fmt.Sprintf("[::]:%d", pongPort)},
		} {
			p, err := c.lab.Start(v.server, v.server.Name+"."+argv[len(argv)-1], argv...)
			if err != nil {
				stop()
				return nil, err
			}
			procs = append(procs, p)
			if argv[0] == "iperf3" {
				v.served = append(v.served, p)
			}
		}
	}
	return stop, nil
}

// fastRules has 1,000 rules of the host for forwarded packets.
func fastRules(ctx context.Context, c *config, all []*route) error {
	var rules strings.Builder
	rules.WriteString("table ip bench {\n chain forward {\n  type filter hook forward priority -10;\n")
	for i := range 1000 {
		fmt.Fprintf(&rules, "  ip saddr 198.18.%d.%d drop\n", i/250, i%250)
	}
	rules.WriteString(" }\n}\n")
	file := c.lab.Dir + "/rules.nft"
	if err := os.WriteFile(file, []byte(rules.String()), 0o644); err != nil {
		return err
	}
	for _, v := range own(all) {
		for _, h := range v.hosts {
			if _, err := h.Run(ctx, "nft", "-f", file); err != nil {
				return err
			}
		}
	}
	samples, err := sampled(c.fastRounds(), own(all), func(v *route) ([]float64, error) {
		udp, err := iperf(ctx, pair{client: v.client, server: v.server, to: v.to4}, "-u", "-l", "64", "-b", "0")
		return []float64{udp}, err
	})
	for _, v := range own(all) {
		for _, h := range v.hosts {
			if _, e := h.Run(ctx, "nft", "delete", "table", "ip", "bench"); e != nil {
				err = errors.Join(err, e)
			}
		}
	}
	if err != nil {
		return err
	}
	c.reportFast("fast path, 1,000 rules of the host", own(all), []kind{{"UDP, 64 bytes", "kpps", ">=", map[string]float64{kernelName: 3}, 0}}, samples)
	return nil
}

// fastPairs is the number of container pairs with streams between them.
const fastPairs = 20

// fastStreams is 64 TCP streams between 20 pairs of containers.
func fastStreams(ctx context.Context, c *config, all []*route) error {
	for _, v := range own(all) {
		for n := range fastPairs {
			p, err := c.attachPair(ctx, v, n+1)
			if err != nil {
				return err
			}
			srv, err := c.lab.Start(p.server, p.server.Name+".iperf3", "iperf3", "-s")
			if err != nil {
				return err
			}
			defer srv.Kill()
			v.served = append(v.served, srv)
			if err := c.reachable(ctx, p); err != nil {
				return err
			}
			v.more = append(v.more, p)
		}
	}
	samples, err := sampled(c.fastRounds(), own(all), func(v *route) ([]float64, error) {
		before, err := processorTime(v.served)
		if err != nil {
			return nil, err
		}
		results, errs := make([]float64, len(v.more)), make(chan error)
		for i, p := range v.more {
			streams := "3"
			if i%5 == 0 {
				streams = "4" // 64 in all
			}
			go func() {
				var err error
				results[i], err = iperfOn(ctx, p, "", "-P", streams)
				errs <- err
			}()
		}
		for range v.more {
			err = errors.Join(err, <-errs)
		}
		if err != nil {
			return nil, err
		}
		after, err := processorTime(v.served)
		sum := 0.0
		for _, r := range results {
			sum += r
		}
		return []float64{sum, (after - before) * 1000 / (sum / 8)}, err
	})
	if err != nil {
		return err
	}
	c.reportFast("fast path, 64 streams between 20 pairs of containers", own(all), []kind{
		{"TCP", "Gbit/s", ">=", map[string]float64{kernelName: 1.1}, 0},
		{"CPU per GB", "ms", "<=", map[string]float64{kernelName: 0.8}, 0},
	}, samples)
	return nil
}

// fastApplications is Debian's Redis and nginx, each with its own load.
func fastApplications(ctx context.Context, c *config, all []*route) error {
	root := c.lab.Dir + "/www"
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(root+"/index.html", []byte(strings.Repeat("x", 1024)), 0o644); err != nil {
		return err
	}
	for _, v := range own(all) {
		conf := fmt.Sprintf("%s/%s.nginx", c.lab.Dir, v.server.Name)
		text := fmt.Sprintf("daemon off; worker_processes 1; pid %s.pid; error_log stderr;\nevents {}\nhttp { access_log off; keepalive_requests 1000000; server { listen 80; root %s; } }\n", conf, root)
		if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
			return err
		}
		for _, argv := range [][]string{
			{"redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--appendonly", "no"},
			{"nginx", "-c", conf},
		} {
			p, err := c.lab.Start(v.server, v.server.Name+"."+argv[0], argv...)
			if err != nil {
				return err
			}
			defer p.Kill()
		}
		if err := lab.Wait(ctx, "Redis and nginx", 10*time.Second, func() error {
			// redis-benchmark waits for ever for a server that refuses it.
			for _, port := range []uint16{6379, 80} {
				conn, err := v.client.Dial(ctx, netip.AddrPortFrom(v.to4, port))
				if err != nil {
					return err
				}
				conn.Close()
			}
			return nil
		}); err != nil {
			return err
		}
	}
	samples, err := sampled(c.fastRounds(), own(all), func(v *route) ([]float64, error) {
		redis, err := redisRate(ctx, v, "60000")
		if err != nil {
			return nil, err
		}
		nginx, err := nginxRate(ctx, v, "1s")
		return []float64{redis, nginx}, err
	})
	if err != nil {
		return err
	}
	c.reportFast("fast path, applications", own(all), []kind{
		{"redis-benchmark GET", "krps", ">=", map[string]float64{kernelName: 1.2}, 0},
		{"nginx and wrk, 1 KiB", "krps", ">=", map[string]float64{kernelName: 1.2}, 0},
	}, samples)
	return nil
}

func redisRate(ctx context.Context, v *route, requests string) (float64, error) {
	out, err := v.client.Run(ctx, "redis-benchmark", "-h", v.to4.String(), "-t", "get", "-n", requests, "-c", "20", "--csv")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(out) {
		if f := strings.Split(strings.ReplaceAll(strings.TrimSpace(line), `"`, ""), ","); len(f) > 1 && f[0] == "GET" {
			n, err := strconv.ParseFloat(f[1], 64)
			return n / 1000, err
		}
	}
	return 0, fmt.Errorf("redis-benchmark: unexpected output %q", out)
}

func nginxRate(ctx context.Context, v *route, duration string) (float64, error) {
	out, err := v.client.Run(ctx, "wrk", "-t", "1", "-c", "20", "-d", duration, "http://"+v.to4.String()+"/")
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(out, "Requests/sec:")
	n, err := strconv.ParseFloat(strings.TrimSpace(strings.SplitN(after, "\n", 2)[0]), 64)
	if err != nil {
		return 0, fmt.Errorf("wrk: unexpected output %q", out)
	}
	return n / 1000, nil
}

// fastAttach is what an ADD costs where an agent attaches the programs meanwhile.
func fastAttach(ctx context.Context, c *config, all []*route) error {
	n := 100
	samples, err := sampled(max(30, c.rounds), own(all), func(v *route) ([]float64, error) {
		n++
		host := v.agents[0]
		space, err := c.lab.Netns(ctx, fmt.Sprintf("%s-a%d", host.Name[strings.LastIndex(host.Name, "-")+1:], n))
		if err != nil {
			return nil, err
		}
		begin := time.Now()
		_, err = c.attachOne(host, fmt.Sprintf("add%d", n), space)
		took := ms(time.Since(begin))
		return []float64{took}, errors.Join(err, space.Delete(ctx))
	})
	if err != nil {
		return err
	}
	c.reportFast("fast path, ADD", own(all), []kind{{"ADD", "ms", "<=", map[string]float64{kernelName: 1.25}, 0}}, samples)
	return nil
}

// fastWithoutOffload has no UDP tunnel segmentation on the underlay.
func fastWithoutOffload(ctx context.Context, c *config, all []*route) error {
	for _, v := range own(all) {
		for _, h := range v.hosts {
			if _, err := h.Run(ctx, "ethtool", "-K", "u0", "tx-udp_tnl-segmentation", "off", "tx-udp_tnl-csum-segmentation", "off"); err != nil {
				return err
			}
		}
	}
	samples, err := sampled(c.fastRounds(), own(all), func(v *route) ([]float64, error) {
		tcp, err := iperf(ctx, pair{client: v.client, server: v.server, to: v.to4}, "-P", "1")
		return []float64{tcp}, err
	})
	if err != nil {
		return err
	}
	c.reportFast("fast path, no UDP tunnel segmentation", own(all), []kind{{"TCP, 1 stream", "Gbit/s", ">=", map[string]float64{kernelName: 0.97}, 0}}, samples)
	return nil
}

// iperfOn is iperf with the processors left to the scheduler when pin is empty.
func iperfOn(ctx context.Context, p pair, pin string, args ...string) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	argv := []string{"iperf3", "-J", "-t", "1", "-c", p.to.String()}
	if pin != "" {
		argv = append(argv, "-A", pin)
	}
	out, err := p.client.Run(ctx, append(argv, args...)...)
	if err != nil {
		return 0, err
	}
	var r struct {
		End struct {
			SumReceived struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return 0, fmt.Errorf("iperf3: %w", err)
	}
	return r.End.SumReceived.BitsPerSecond / 1e9, nil
}
