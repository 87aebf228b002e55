package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/integration/lab"
)

// route is a way from a container to one on another host. Its two hosts are
// joined by a link of their own.
type route struct {
	name           string
	hosts          [2]*lab.Node
	client, server *lab.Netns
	to4, to6       netip.Addr
	agents         [2]*lab.Host // of our own ways
	more           []pair       // of containers, beside the first
	served         []*lab.Proc  // iperf3 in the servers
}

// The routes. All but the bare underlay have a masquerading rule; ours, and the underlay
// between our hosts, have the whole firewall.
const (
	fastName   = "fast path"
	directName = "direct routing" // ours, the same programs without the header
	kernelName = "kernel path"
	handName   = "VXLAN by hand"
	routedName = "host-gw"
	hostsName  = "underlay of our hosts" // no containers; rules as for the fast path
	rawName    = "raw underlay"          // no containers and no rules at all
)

// pairLink joins two hosts directly: the underlay of a route.
func pairLink(ctx context.Context, number int, a, b *lab.Node) error {
	if err := a.Configure(ctx, "link add u0 type veth peer name u0 netns "+b.Name); err != nil {
		return err
	}
	for i, n := range []*lab.Node{a, b} {
		n.IP = netip.AddrFrom4([4]byte{172, 18, byte(number), byte(i + 1)})
		n.IP6 = netip.MustParseAddr(fmt.Sprintf("fd00:172:18:%d::%d", number, i+1))
		if err := n.Configure(ctx, "link set u0 up", fmt.Sprintf("address add %s/24 dev u0", n.IP), fmt.Sprintf("address add %s/64 dev u0 nodad", n.IP6)); err != nil {
			return err
		}
	}
	return nil
}

// fastVariants makes all of them.
func (c *config) fastVariants(ctx context.Context) ([]*route, error) {
	control, err := c.lab.Node(ctx, "control", 250)
	if err != nil {
		return nil, err
	}
	coordinator, err := c.lab.StartCoordinator(ctx, control, clusterYAML)
	if err != nil {
		return nil, err
	}
	var all []*route
	for i, way := range []struct {
		name string
		args []string
	}{
		{fastName, []string{"--datapath", "ebpf"}}, {kernelName, []string{"--datapath", "kernel"}}, {handName, nil},
		{directName, []string{"--datapath", "ebpf", "--routing", "direct"}}, {routedName, nil}, {rawName, nil},
	} {
		var v *route
		switch {
		case !picked(c.only.ways, way.name):
			continue
		case way.args != nil:
			v, err = c.ownVariant(ctx, way.name, i, coordinator.URL, way.args)
		default:
			v, err = c.handVariant(ctx, way.name, i)
		}
		if err != nil {
			return nil, err
		}
		all = append(all, v)
		if way.name == fastName && picked(c.only.ways, hostsName) {
			all = append(all, &route{name: hostsName, client: v.hosts[0].Netns, server: v.hosts[1].Netns, to4: v.hosts[1].IP, to6: v.hosts[1].IP6})
		}
	}
	return all, nil
}

// ownVariant runs our agents on both hosts and attaches a container to each.
func (c *config) ownVariant(ctx context.Context, name string, number int, url string, args []string) (*route, error) {
	v := &route{name: name}
	for i := range v.agents {
		host, err := c.lab.Host(ctx, fmt.Sprintf("own%d%d", number, i), byte(2+2*number+i))
		if err != nil {
			return nil, err
		}
		v.agents[i], v.hosts[i] = host, host.Node
	}
	if err := pairLink(ctx, number, v.hosts[0], v.hosts[1]); err != nil {
		return nil, err
	}
	for _, host := range v.agents {
		if err := c.tmpfs(host.RunDir); err != nil {
			return nil, err
		}
		if err := host.StartAgent(url, args...); err != nil {
			return nil, err
		}
		if err := host.WaitReady(ctx); err != nil {
			return nil, err
		}
	}
	first, err := c.attachPair(ctx, v, 0)
	if err != nil {
		return nil, err
	}
	v.client, v.server, v.to4 = first.client, first.server, first.to
	v.to6 = netip.MustParseAddr(first.name)
	if name != kernelName {
		err = lab.Wait(ctx, "the fast path", 20*time.Second, func() error { return fastPackets(ctx, v) })
	}
	return v, err
}

// fastPackets proves that packets take the fast path.
func fastPackets(ctx context.Context, v *route) error {
	if _, err := v.client.Run(ctx, "ping", "-c", "2", "-i", "0.05", "-W", "1", v.to4.String()); err != nil {
		return err
	}
	n, err := fastCount(ctx, v)
	if err == nil && n == 0 {
		err = fmt.Errorf("no packet of %s took the fast path", v.agents[0].Name)
	}
	return err
}

// fastCount is how many packets of the first host the fast path took.
func fastCount(ctx context.Context, v *route) (sum float64, err error) {
	b, err := v.agents[0].Get(ctx, "/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "overlay_agent_traffic_packets_total{") && strings.Contains(line, `path="fast"`) {
			f := strings.Fields(line)
			n, err := strconv.ParseFloat(f[len(f)-1], 64)
			if err != nil {
				return 0, fmt.Errorf("metrics of %s: %w", v.agents[0].Name, err)
			}
			sum += n
		}
	}
	return sum, nil
}

// attachPair attaches a container on each host. The name of the pair is the
// server's IPv6 address.
func (c *config) attachPair(ctx context.Context, v *route, n int) (p pair, err error) {
	for i, host := range v.agents {
		space, err := c.lab.Netns(ctx, fmt.Sprintf("%s-c%d", filepath.Base(host.Dir), n))
		if err != nil {
			return p, err
		}
		addrs, err := c.attachOne(host, fmt.Sprintf("dp%d", n), space)
		if err != nil {
			return p, err
		}
		if i == 0 {
			p.client = space
		} else {
			p.server, p.to, p.name = space, addrs[0], addrs[1].String()
		}
	}
	return p, nil
}

// attachOne attaches a container to the overlay of both families.
func (c *config) attachOne(host *lab.Host, id string, space *lab.Netns) ([]netip.Addr, error) {
	addrs, err := c.attachTo(host, "dual", id, space)
	if err == nil && len(addrs) != 2 {
		err = fmt.Errorf("attach: unexpected addresses %v", addrs)
	}
	return addrs, err
}

// handVariant is made with ip(8): VXLAN or plain routes, a bridge, one
// masquerading rule, or nothing but the hosts.
func (c *config) handVariant(ctx context.Context, name string, number int) (*route, error) {
	v := &route{name: name}
	for i := range v.hosts {
		var err error
		if v.hosts[i], err = c.lab.Node(ctx, fmt.Sprintf("hand%d%d", number, i), byte(2+2*number+i)); err != nil {
			return nil, err
		}
	}
	if err := pairLink(ctx, number, v.hosts[0], v.hosts[1]); err != nil {
		return nil, err
	}
	if name == rawName {
		v.client, v.server, v.to4, v.to6 = v.hosts[0].Netns, v.hosts[1].Netns, v.hosts[1].IP, v.hosts[1].IP6
		return v, nil
	}
	for i, node := range v.hosts {
		space, err := c.lab.Netns(ctx, fmt.Sprintf("hand%d%d-c", number, i))
		if err != nil {
			return nil, err
		}
		if err := handHost(ctx, name, i, node, v.hosts[1-i], space); err != nil {
			return nil, err
		}
		if i == 0 {
			v.client = space
		} else {
			v.server, v.to4, v.to6 = space, netip.MustParseAddr("9.200.1.2"), netip.MustParseAddr("fd09:200:0:1::2")
		}
	}
	return v, nil
}

func handHost(ctx context.Context, name string, i int, node, other *lab.Node, space *lab.Netns) error {
	for _, key := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
		if err := node.Sysctl(ctx, key, "1"); err != nil {
			return err
		}
	}
	for _, rule := range []string{
		"iptables -t nat -A POSTROUTING -s 9.200.0.0/16 ! -d 9.200.0.0/16 -j MASQUERADE",
		"ip6tables -t nat -A POSTROUTING -s fd09:200::/32 ! -d fd09:200::/32 -j MASQUERADE",
	} {
		if _, err := node.Run(ctx, strings.Fields(rule)...); err != nil {
			return err
		}
	}
	mtu, via4, via6 := 1500, other.IP.String(), other.IP6.String()
	if name == handName {
		mtu, via4, via6 = 1450, fmt.Sprintf("45.0.0.%d", 2-i), fmt.Sprintf("fd45::%d", 2-i)
		if err := node.Configure(ctx,
			fmt.Sprintf("link add vx address 02:00:00:00:00:0%d mtu 1450 type vxlan id 1024 dstport 64000 nolearning local %s", i, node.IP),
			"link set vx up", fmt.Sprintf("address add 45.0.0.%d/24 dev vx", i+1), fmt.Sprintf("address add fd45::%d/64 dev vx nodad", i+1),
			fmt.Sprintf("neigh add %s lladdr 02:00:00:00:00:0%d nud permanent dev vx", via4, 1-i),
			fmt.Sprintf("neigh add %s lladdr 02:00:00:00:00:0%d nud permanent dev vx", via6, 1-i)); err != nil {
			return err
		}
		if _, err := node.Run(ctx, "bridge", "fdb", "append", fmt.Sprintf("02:00:00:00:00:0%d", 1-i), "dev", "vx", "dst", other.IP.String(), "self", "permanent"); err != nil {
			return err
		}
	}
	if err := node.Configure(ctx,
		fmt.Sprintf("link add name hand up mtu %d type bridge", mtu),
		fmt.Sprintf("address add 9.200.%d.1/24 dev hand", i), fmt.Sprintf("address add fd09:200:0:%d::1/64 dev hand nodad", i),
		fmt.Sprintf("route add 9.200.%d.0/24 via %s", 1-i, via4), fmt.Sprintf("route add fd09:200:0:%d::/64 via %s", 1-i, via6),
		fmt.Sprintf("link add h0 up mtu %d master hand type veth peer name eth0 mtu %d netns %s", mtu, mtu, space.Name)); err != nil {
		return err
	}
	return space.Configure(ctx, "link set eth0 up", fmt.Sprintf("address add 9.200.%d.2/24 dev eth0", i), fmt.Sprintf("address add fd09:200:0:%d::2/64 dev eth0 nodad", i),
		fmt.Sprintf("route add default via 9.200.%d.1", i), fmt.Sprintf("route add default via fd09:200:0:%d::1", i))
}

// processorTime is what the programs of a measurement used so far, in seconds:
// those that ended, those that serve, and the kernel's threads for packets that
// their processor had no time for. Work that the kernel does for packets while a
// program runs is that program's. Others on the machine do not count.
func processorTime(servers []*lab.Proc) (float64, error) {
	var children unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &children); err != nil {
		return 0, err
	}
	sum := time.Duration(children.Utime.Nano() + children.Stime.Nano()).Seconds()
	threads, err := softirqThreads()
	if err != nil {
		return 0, err
	}
	for _, p := range servers {
		threads = append(threads, p.Pid())
	}
	for _, pid := range threads {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		for _, text := range f[11:13] { // utime, stime
			ticks, err := strconv.ParseFloat(text, 64)
			if err != nil {
				return 0, err
			}
			sum += ticks / 100
		}
	}
	return sum, nil
}

// softirqThreads are the process ids of ksoftirqd.
func softirqThreads() (pids []int, err error) {
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil || !strings.HasPrefix(string(b), "ksoftirqd/") {
			continue // or it has ended
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, err
}
