package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
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

// The ways that dataplane compares, beside handName.
const (
	oursName       = "ours"
	oursKernelName = "ours, kernel path"
	oldName        = "other build"
	masqName       = "by hand with masquerade"
)

// dataplane compares what crosses hosts over our overlay, as the agent chooses the
// way and by the kernel's, with another build and with the same VXLAN made by hand:
// without any firewall, so that its containers reach nothing outside, and with the
// one rule by which they do. That rule alone makes the kernel track every
// connection of the host.
func dataplane(ctx context.Context, c *config) error {
	all, err := c.dataplaneRoutes(ctx)
	if err != nil {
		return err
	}
	stop, err := c.serveFast(all)
	if err != nil {
		return err
	}
	defer stop()
	ours := all[0]
	before, err := fastCount(ctx, ours)
	if err != nil {
		return err
	}
	samples, err := sampled(max(5, c.rounds/3), all, func(v *route) ([]float64, error) { return dataplaneSample(ctx, v) })
	if err != nil {
		return err
	}
	after, err := fastCount(ctx, ours)
	if err != nil {
		return err
	}
	taken, reason, err := takenBy(ours.agents[0])
	if err != nil {
		return err
	}
	if taken == "ebpf" && after-before < float64(len(samples[oursName][0])*leastPackets) {
		return fmt.Errorf("%s says ebpf, but the fast path took only %.0f packets of what was measured", ours.agents[0].Name, after-before)
	}
	fmt.Printf("ours takes %s %s\n", taken, reason)
	reportDataplane(c, all, samples)
	return nil
}

// leastPackets is less than a round sends.
const leastPackets = 20_000

// dataplaneSample measures everything once. A TCP connection keeps one of two
// speeds as long as it lives, so a sample is the mean of several.
func dataplaneSample(ctx context.Context, v *route) ([]float64, error) {
	const connections = 3
	p := pair{name: v.name, client: v.client, server: v.server, to: v.to4}
	var sum float64
	for range connections {
		tcp, err := iperf(ctx, p, "-P", "1", "-n", "512M")
		if err != nil {
			return nil, err
		}
		sum += tcp
	}
	tcp8, err := iperf(ctx, p, "-P", "8", "-n", "1G")
	if err != nil {
		return nil, err
	}
	udp, err := iperf(ctx, p, "-u", "-l", "64", "-b", "0", "-n", "2500K") // 40,000 datagrams
	if err != nil {
		return nil, err
	}
	latency, err := pingPong(ctx, p)
	return []float64{sum / connections, tcp8, udp, latency}, err
}

// reportDataplane adds the rows, and the goals of both our ways: against the other
// build, and of the one that containers get against what is made by hand.
func reportDataplane(c *config, all []*route, samples map[string][][]float64) {
	const part = "across hosts"
	for i, k := range []kind{
		{name: "TCP, 1 stream", unit: "Gbit/s", op: ">="}, {name: "TCP, 8 streams", unit: "Gbit/s", op: ">="},
		{name: "UDP, 64 bytes", unit: "kpps", op: ">="}, {name: "ping-pong, one CPU, one way", unit: "us", op: "<="},
	} {
		limit := 0.97
		if k.op == "<=" {
			limit = 1.03
		}
		for _, v := range all {
			c.report.add(part, k.name+", "+v.name, k.unit, samples[v.name][i])
		}
		for _, goal := range [][2]string{{oursName, oldName}, {oursKernelName, oldName}, {oursName, handName}, {oursName, masqName}} {
			c.paired(part, k, goal[0], goal[1], limit, i, samples)
		}
	}
}

// dataplaneRoutes makes all ways. A lab has one coordinator at a time, so that of
// the other build goes when its hosts are set up, and its agents with it; packets
// need neither.
func (c *config) dataplaneRoutes(ctx context.Context) (all []*route, err error) {
	if c.base != "" {
		c.lab.Bin = c.base
		old, made, err := c.pairOf(ctx, oldName, "old", 2, clusterYAML)
		c.lab.Bin = c.bin
		if err != nil {
			return nil, err
		}
		if err := c.leave(made); err != nil {
			return nil, err
		}
		all = append(all, routeOf(old, made))
	}
	own, made, err := c.pairOf(ctx, oursName, "own", 4, clusterYAML)
	if err != nil {
		return nil, err
	}
	ours := routeOf(own, made)
	kernel, made, err := c.joinPair(ctx, oursKernelName, "kern", 6, made.coordinator, func(h *lab.Host) { h.Datapath = "kernel" })
	if err != nil {
		return nil, err
	}
	all = append([]*route{ours, routeOf(kernel, made)}, all...)
	for _, v := range all[:2] {
		if err := settled(ctx, v); err != nil {
			return nil, err
		}
	}
	hand, err := c.handPair(ctx, handName, 12)
	if err != nil {
		return nil, err
	}
	masq, err := c.handPair(ctx, masqName, 14, "-t", "nat", "-A", "POSTROUTING", "-s", "9.200.0.0/16", "!", "-d", "9.200.0.0/16", "-j", "MASQUERADE")
	return append(all, routeOf(hand, nil), routeOf(masq, nil)), err
}

func routeOf(p pair, made *cluster) *route {
	v := &route{name: p.name, client: p.client, server: p.server, to4: p.to}
	if made != nil {
		copy(v.agents[:], made.hosts)
	}
	return v
}

// settled waits until both agents have said which way traffic takes, and, where
// that is the fast path, until packets take it.
func settled(ctx context.Context, v *route) error {
	for _, h := range v.agents {
		if err := lab.Wait(ctx, h.Name+" to choose a datapath", 45*time.Second, func() error {
			taken, reason, err := takenBy(h)
			switch {
			case err != nil:
				return err
			case taken == "":
				return errors.New("it has not said yet")
			case taken == "ebpf" && v.name == oursKernelName:
				return errors.New("it takes ebpf")
			case taken == "kernel" && reason == "" && h.Datapath == "":
				return errors.New("it takes the kernel's and does not say why")
			}
			return nil
		}); err != nil {
			return err
		}
	}
	if taken, _, err := takenBy(v.agents[0]); err != nil || taken != "ebpf" {
		return err
	}
	return lab.Wait(ctx, "the fast path", 20*time.Second, func() error { return fastPackets(ctx, v) })
}

// takenBy is the way that a host's agent says it takes, and why.
func takenBy(h *lab.Host) (taken, reason string, err error) {
	b, err := os.ReadFile(filepath.Join(h.RunDir, "state.json"))
	if err != nil {
		return "", "", err
	}
	var s struct {
		Datapath struct{ Taken, Reason string }
	}
	err = json.Unmarshal(b, &s)
	return s.Datapath.Taken, s.Datapath.Reason, err
}

// cluster is two hosts and their coordinator.
type cluster struct {
	hosts       []*lab.Host
	coordinator *lab.Coordinator
}

// pairOf attaches a container to the overlay v4 on each of two hosts of a cluster
// of their own, which are number n and n+1 of the lab.
func (c *config) pairOf(ctx context.Context, name, prefix string, n int, yaml string, args ...string) (pair, *cluster, error) {
	control, err := c.lab.Node(ctx, prefix+"control", byte(200+n))
	if err != nil {
		return pair{}, &cluster{}, err
	}
	coordinator, err := c.lab.StartCoordinator(ctx, control, yaml)
	if err != nil {
		return pair{}, &cluster{}, err
	}
	return c.joinPair(ctx, name, prefix, n, coordinator, func(h *lab.Host) { h.Bin = c.lab.Bin }, args...)
}

// joinPair is pairOf for two more hosts of a cluster that there is, which are
// adapted before their agents start.
func (c *config) joinPair(ctx context.Context, name, prefix string, n int, coordinator *lab.Coordinator, adapt func(*lab.Host), args ...string) (pair, *cluster, error) {
	p, made := pair{name: name}, &cluster{coordinator: coordinator}
	for i := range 2 {
		host, err := c.lab.Host(ctx, fmt.Sprintf("%s%d", prefix, i), byte(n+i))
		if err != nil {
			return p, made, err
		}
		adapt(host)
		if err := c.startAgent(ctx, host, coordinator.URL, args...); err != nil {
			return p, made, err
		}
		made.hosts = append(made.hosts, host)
		space, err := c.lab.Netns(ctx, fmt.Sprintf("%s%d-c", prefix, i))
		if err != nil {
			return p, made, err
		}
		addrs, err := c.attachTo(host, "v4", "dp", space)
		if err != nil {
			return p, made, err
		}
		if i == 0 {
			p.client = space
		} else {
			p.server, p.to = space, addrs[0]
		}
	}
	return p, made, c.reachable(ctx, p)
}

// attachTo attaches a container as a runtime does that says that there are no host
// ports, which is what the agent's files ask of it.
func (c *config) attachTo(host *lab.Host, overlay, id string, space *lab.Netns) ([]netip.Addr, error) {
	bin := cmp.Or(host.Bin, c.bin)
	conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"type":"m-overlay","runDir":%q,"capabilities":{"portMappings":true},"ipam":{"type":"overlay-ipam"}}`, overlay, host.RunDir)
	cmd := cni(filepath.Join(bin, "m-overlay"), "ADD", conf, id, space.Path, bin)
	var out []byte
	if err := ns.WithNetNSPath(host.Path, func(ns.NetNS) (err error) { out, err = cmd.Output(); return err }); err != nil {
		return nil, fmt.Errorf("attach: %w: %s", err, out)
	}
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal(out, &result); err != nil || len(result.IPs) == 0 {
		return nil, fmt.Errorf("attach: unexpected result %s", out)
	}
	var addrs []netip.Addr
	for _, ip := range result.IPs {
		addrs = append(addrs, ip.Address.Addr())
	}
	return addrs, nil
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
	if !slices.Contains(args, "-n") {
		args = append([]string{"-t", "1"}, args...)
	}
	out, err := p.client.Run(ctx, append([]string{"iperf3", "-J", "-A", "0,1", "-c", p.to.String()}, args...)...)
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
