package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"overlayd.internal/overlay/integration/lab"
)

// pair is two containers on two hosts.
type pair struct {
	name           string
	client, server *lab.Netns
	to             netip.Addr
}

// dataplane compares what crosses hosts over our overlay with the same VXLAN
// made by hand: without any firewall, so that its containers reach nothing
// outside, and with the one rule by which they do. That rule alone makes the
// kernel track every connection of the host.
func dataplane(ctx context.Context, c *config) error {
	own, err := c.overlayPair(ctx)
	if err != nil {
		return err
	}
	hand, err := c.handPair(ctx, "by hand", 12)
	if err != nil {
		return err
	}
	masq, err := c.handPair(ctx, "by hand with masquerade", 14, "-t", "nat", "-A", "POSTROUTING", "-s", "9.200.0.0/16", "!", "-d", "9.200.0.0/16", "-j", "MASQUERADE")
	if err != nil {
		return err
	}
	pairs := []pair{own, hand, masq}
	const part = "across hosts"
	kinds := []struct {
		name, unit string
		limit      float64
		op         string
		run        func(context.Context, pair) (float64, error)
	}{
		{"TCP, 1 stream", "Gbit/s", 0.97, ">=", func(ctx context.Context, p pair) (float64, error) { return iperf(ctx, p, "-P", "1") }},
		{"TCP, 8 streams", "Gbit/s", 0.97, ">=", func(ctx context.Context, p pair) (float64, error) { return iperf(ctx, p, "-P", "8") }},
		{"UDP, 64 bytes", "kpps", 0.97, ">=", func(ctx context.Context, p pair) (float64, error) {
			return iperf(ctx, p, "-u", "-l", "64", "-b", "0")
		}},
		{"ping-pong, one CPU, one way", "us", 1.03, "<=", pingPong},
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, p := range pairs {
		srv, err := c.lab.Start(p.server, p.server.Name+".iperf3", "iperf3", "-s")
		if err != nil {
			return err
		}
		defer srv.Kill()
		echo, err := c.lab.Start(p.server, p.server.Name+".pong", "taskset", "-c", "0", self, "-pong", fmt.Sprintf("0.0.0.0:%d", pongPort))
		if err != nil {
			return err
		}
		defer echo.Kill()
	}
	for _, k := range kinds {
		samples := make([][]float64, len(pairs))
		for round := range max(5, c.rounds/3) + 1 {
			for j := range pairs {
				i := (j + round) % len(pairs)
				v, err := k.run(ctx, pairs[i])
				if err != nil {
					return fmt.Errorf("%s over %s: %w", k.name, pairs[i].name, err)
				}
				if round > 0 {
					samples[i] = append(samples[i], v)
				}
			}
		}
		for i, p := range pairs {
			c.report.add(part, k.name+", "+p.name, k.unit, samples[i])
		}
		for _, peer := range pairs[1:] {
			c.report.ratio(part, k.name+", "+own.name, k.name+", "+peer.name, k.op, k.limit)
		}
	}
	return nil
}

// overlayPair attaches a container on each of two hosts with m-overlay.
func (c *config) overlayPair(ctx context.Context) (pair, error) {
	p, _, err := c.pairOf(ctx, "ours", "own", 2, clusterYAML)
	return p, err
}

// cluster is two hosts and their coordinator.
type cluster struct {
	hosts       []*lab.Host
	coordinator *lab.Coordinator
}

// pairOf attaches a container to the overlay v4 on each of two hosts of a cluster
// of their own, which are number n and n+1 of the lab.
func (c *config) pairOf(ctx context.Context, name, prefix string, n int, yaml string, args ...string) (pair, *cluster, error) {
	p := pair{name: name}
	made := &cluster{}
	for i := range 2 {
		host, err := c.lab.Host(ctx, fmt.Sprintf("%s%d", prefix, i), byte(n+i))
		if err != nil {
			return p, made, err
		}
		if i == 0 {
			coordinator, err := c.lab.StartCoordinator(ctx, host.Node, yaml)
			if err != nil {
				return p, made, err
			}
			made.coordinator = coordinator
		}
		if err := c.startAgent(ctx, host, made.coordinator.URL, args...); err != nil {
			return p, made, err
		}
		made.hosts = append(made.hosts, host)
		space, err := c.lab.Netns(ctx, fmt.Sprintf("%s%d-c", prefix, i))
		if err != nil {
			return p, made, err
		}
		conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"v4","type":"m-overlay","runDir":%q,"ipam":{"type":"overlay-ipam"}}`, host.RunDir)
		cmd := cni(filepath.Join(c.bin, "m-overlay"), "ADD", conf, "dp", space.Path, c.bin)
		var out []byte
		if err := ns.WithNetNSPath(host.Path, func(ns.NetNS) (err error) { out, err = cmd.Output(); return err }); err != nil {
			return p, made, fmt.Errorf("attach: %w: %s", err, out)
		}
		var result struct {
			IPs []struct{ Address netip.Prefix }
		}
		if err := json.Unmarshal(out, &result); err != nil || len(result.IPs) == 0 {
			return p, made, fmt.Errorf("attach: unexpected result %s", out)
		}
		if i == 0 {
			p.client = space
		} else {
			p.server, p.to = space, result.IPs[0].Address.Addr()
		}
	}
	return p, made, c.reachable(ctx, p)
}

// handPair makes the same with ip(8): VXLAN, bridge, veth, static entries, and a
// rule for iptables if there is one. Its hosts are number n and n+1 of the lab.
func (c *config) handPair(ctx context.Context, name string, n int, rule ...string) (pair, error) {
	p := pair{name: name}
	var nodes [2]*lab.Node
	for i := range nodes {
		var err error
		if nodes[i], err = c.lab.Node(ctx, fmt.Sprintf("hand%d", n+i), byte(n+i)); err != nil {
			return p, err
		}
		if len(rule) > 0 {
			if _, err := nodes[i].Run(ctx, append([]string{"iptables"}, rule...)...); err != nil {
				return p, err
			}
		}
	}
	for i, node := range nodes {
		other := nodes[1-i]
		space, err := c.lab.Netns(ctx, fmt.Sprintf("hand%d-c", n+i))
		if err != nil {
			return p, err
		}
		if err := node.Sysctl(ctx, "net.ipv4.ip_forward", "1"); err != nil {
			return p, err
		}
		err = node.Configure(ctx,
			fmt.Sprintf("link add vx address 02:00:00:00:00:0%d mtu 1450 type vxlan id 1024 dstport 64000 nolearning local %s", i, node.IP),
			"link set vx up", fmt.Sprintf("address add 45.0.0.%d/24 dev vx", i+1),
			fmt.Sprintf("neigh add 45.0.0.%d lladdr 02:00:00:00:00:0%d nud permanent dev vx", 2-i, 1-i),
			"link add name hand up mtu 1450 type bridge", fmt.Sprintf("address add 9.200.%d.1/24 dev hand", i),
			fmt.Sprintf("route add 9.200.%d.0/24 via 45.0.0.%d", 1-i, 2-i),
			fmt.Sprintf("link add h0 up mtu 1450 master hand type veth peer name eth0 mtu 1450 netns %s", space.Name),
		)
		if err != nil {
			return p, err
		}
		if _, err := node.Run(ctx, "bridge", "fdb", "append", fmt.Sprintf("02:00:00:00:00:0%d", 1-i), "dev", "vx", "dst", other.IP.String(), "self", "permanent"); err != nil {
			return p, err
		}
		if err := space.Configure(ctx, "link set eth0 up", fmt.Sprintf("address add 9.200.%d.2/24 dev eth0", i), fmt.Sprintf("route add default via 9.200.%d.1", i)); err != nil {
			return p, err
		}
		if i == 0 {
			p.client = space
		} else {
			p.server, p.to = space, netip.MustParseAddr("9.200.1.2")
		}
	}
	return p, c.reachable(ctx, p)
}

func (c *config) reachable(ctx context.Context, p pair) error {
	return lab.Wait(ctx, "traffic over "+p.name, 10*time.Second, func() error {
		_, err := p.client.Run(ctx, "ping", "-c", "1", "-W", "1", p.to.String())
		return err
	})
}

// iperf returns Gbit/s for TCP and thousand packets a second received for UDP.
// Each end has a CPU of its own: left to the scheduler, they meet on one now and
// then, and then the same stream is half as fast.
func iperf(ctx context.Context, p pair, args ...string) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	out, err := p.client.Run(ctx, append([]string{"iperf3", "-J", "-t", "1", "-A", "0,1", "-c", p.to.String()}, args...)...)
	if err != nil {
		return 0, err
	}
	var r struct {
		End struct {
			SumReceived struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
			Sum struct {
				Seconds float64 `json:"seconds"`
				Packets float64 `json:"packets"`
				Lost    float64 `json:"lost_packets"`
			} `json:"sum"`
		} `json:"end"`
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return 0, fmt.Errorf("iperf3: %w: %s", err, out)
	}
	if r.End.Sum.Packets > 0 {
		return (r.End.Sum.Packets - r.End.Sum.Lost) / r.End.Sum.Seconds / 1000, nil
	}
	return r.End.SumReceived.BitsPerSecond / 1e9, nil
}
