package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

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

// routeProtocol is the protocol number of the agent's routes.
const routeProtocol = 44

// entryWatch sees every entry the kernel makes in a namespace. It reads no more
// of a notification than it needs: it runs on the same cores as what it watches.
type entryWatch struct {
	fd      int
	buf     []byte
	pending []byte
}

func watchEntries(n *lab.Netns) (*entryWatch, error) {
	w := &entryWatch{buf: make([]byte, 256<<10)}
	err := ns.WithNetNSPath(n.Path, func(ns.NetNS) (err error) {
		if w.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE); err != nil {
			return err
		}
		if err := unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
			return err
		}
		return unix.Bind(w.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK,
			Groups: 1<<(unix.RTNLGRP_NEIGH-1) | 1<<(unix.RTNLGRP_IPV4_ROUTE-1)})
	})
	return w, err
}

func (w *entryWatch) close() { unix.Close(w.fd) }

// until counts routes of the agent to other hosts until there are n. It returns
// when the first permanent neighbour and the last route appeared.
func (w *entryWatch) until(ctx context.Context, n int) (first, last time.Time, err error) {
	for seen := 0; seen < n; {
		if ctx.Err() != nil {
			return first, last, fmt.Errorf("%d of %d routes have appeared: %w", seen, n, context.Cause(ctx))
		}
		if len(w.pending) == 0 {
			size, _, err := unix.Recvfrom(w.fd, w.buf, 0)
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return first, last, fmt.Errorf("after %d of %d routes: %w", seen, n, err)
			}
			w.pending = w.buf[:size]
		}
		for len(w.pending) >= unix.SizeofNlMsghdr && seen < n {
			m := w.pending
			size := int(binary.NativeEndian.Uint32(m))
			typ, body := binary.NativeEndian.Uint16(m[4:]), m[unix.SizeofNlMsghdr:size]
			w.pending = m[min((size+3)&^3, len(m)):]
			switch {
			// A bridge makes permanent entries, too, of no type.
			case typ == unix.RTM_NEWNEIGH && first.IsZero() && body[11] == unix.RTN_UNICAST && binary.NativeEndian.Uint16(body[8:])&unix.NUD_PERMANENT != 0:
				first = time.Now()
			case typ == unix.RTM_NEWROUTE && body[5] == routeProtocol && body[7] == unix.RTN_UNICAST:
				last = time.Now()
				seen++
			}
		}
	}
	return first, last, nil
}

// drain forgets what has come so far.
func (w *entryWatch) drain() {
	w.pending = nil
	for {
		if _, _, err := unix.Recvfrom(w.fd, w.buf, unix.MSG_DONTWAIT); err != nil {
			return
		}
	}
}

// oneByOne programs peers the customary way: the netlink library, a socket for
// every call, no metric. It returns the time for n neighbours, FDB entries and
// routes.
func oneByOne(space *lab.Netns, n int) (time.Duration, error) {
	var took time.Duration
	err := ns.WithNetNSPath(space.Path, func(ns.NetNS) error {
		link := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "flannel.1", MTU: 1450}, VxlanId: 1, Port: 8472}
		if err := netlink.LinkAdd(link); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		own := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(44, 255, 255, 254), Mask: net.CIDRMask(8, 32)}}
		if err := netlink.AddrAdd(link, own); err != nil {
			return err
		}
		start := time.Now()
		for i := range n {
			hi, lo := byte(i>>8), byte(i)
			vtep, mac := net.IPv4(44, 0, hi, lo), net.HardwareAddr{2, 0, 0, 0, hi, lo}
			if i == 0 {
				vtep = net.IPv4(44, 1, 0, 0)
			}
			neigh := &netlink.Neigh{LinkIndex: link.Index, State: netlink.NUD_PERMANENT, Type: unix.RTN_UNICAST, IP: vtep, HardwareAddr: mac}
			if err := netlink.NeighSet(neigh); err != nil {
				return fmt.Errorf("neighbour %d: %w", i, err)
			}
			fdb := &netlink.Neigh{LinkIndex: link.Index, State: netlink.NUD_PERMANENT, Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF,
				IP: net.IPv4(172, 20, hi, lo), HardwareAddr: mac}
			if err := netlink.NeighSet(fdb); err != nil {
				return fmt.Errorf("fdb entry %d: %w", i, err)
			}
			route := &netlink.Route{LinkIndex: link.Index, Scope: netlink.SCOPE_UNIVERSE, Gw: vtep, Flags: int(netlink.FLAG_ONLINK),
				Dst: &net.IPNet{IP: net.IPv4(9, hi, lo, 0), Mask: net.CIDRMask(24, 32)}}
			if err := netlink.RouteReplace(route); err != nil {
				return fmt.Errorf("route %d: %w", i, err)
			}
		}
		took = time.Since(start)
		return netlink.LinkDel(link)
	})
	return took, err
}

// converge measures how fast a host knows its peers.
func converge(ctx context.Context, c *config) error {
	coord, err := c.lab.Node(ctx, "coord", 2)
	if err != nil {
		return err
	}
	coordinator, err := c.lab.StartCoordinator(ctx, coord, singleYAML)
	if err != nil {
		return err
	}
	url := coordinator.URL
	client := clientIn(coord, 32)
	const part = "convergence"
	perEntry := map[int]float64{}
	have := 0
	for _, step := range []struct {
		peers, starts int
	}{{100, 5}, {4000, 5}, {16000, 3}} {
		if _, err := registerMany(ctx, client, url, have, step.peers, 32); err != nil {
			return err
		}
		have = step.peers
		row, err := c.coldRows(ctx, url, step.peers, step.starts)
		if err != nil {
			return fmt.Errorf("%d peers: %w", step.peers, err)
		}
		perEntry[step.peers] = row.P50 / float64(step.peers)
		if step.peers == 100 {
			continue
		}
		var slow []float64
		for k := range max(1, step.starts-2) {
			space, err := c.lab.Netns(ctx, fmt.Sprintf("fl%d-%d", step.peers, k))
			if err != nil {
				return err
			}
			t, err := oneByOne(space, step.peers)
			if err != nil {
				return err
			}
			slow = append(slow, ms(t))
		}
		c.report.add(part, fmt.Sprintf("one by one, a socket each, %d peers", step.peers), "ms", slow)
		if step.peers == 4000 {
			if err := c.oneMore(ctx, url, client, have); err != nil {
				return err
			}
			have += oneMoreSamples
		}
	}
	r := c.report
	r.ratio(part, "all entries from cold, 4000 peers", "one by one, a socket each, 4000 peers", "<=", 0.12)
	r.ratio(part, "all entries from cold, 16000 peers", "one by one, a socket each, 16000 peers", "<=", 0.05)
	r.goal(part, "per entry, 16,000 peers", "per entry, 4,000 peers", perEntry[16000]/perEntry[4000], "<=", 1.3)
	r.absolute(part, "agent start to last route, 4000 peers", "<=", 500)
	r.absolute(part, "agent start to last route, 100 peers", "<=", 100)
	return nil
}

// absolute adds a goal on a row's median itself.
func (r *Report) absolute(part, what, op string, limit float64) {
	if row, ok := r.find(part, what); ok {
		r.goal(part, what+" ("+row.Unit+")", "", row.P50, op, limit)
	}
}

// otherBuild ends the names of rows that the agent of another build made.
const otherBuild = ", other build"

// coldRows starts an agent on a new host several times, by turns with that of
// another build where there is one. Its rows are the time from the start of the
// process to the last route, and from the first forwarding entry to the last
// route; the latter is returned.
func (c *config) coldRows(ctx context.Context, url string, peers, n int) (Row, error) {
	builds := []string{c.bin}
	if c.base != "" {
		builds, n = append(builds, c.base), max(n, baseRounds)
	}
	starts, programs := make([][]float64, len(builds)), make([][]float64, len(builds))
	for range n {
		for i, bin := range builds {
			start, program, err := c.coldStart(ctx, bin, url, peers)
			if err != nil {
				return Row{}, err
			}
			starts[i], programs[i] = append(starts[i], start), append(programs[i], program)
		}
	}
	const part = "convergence"
	start, program := fmt.Sprintf("agent start to last route, %d peers", peers), fmt.Sprintf("all entries from cold, %d peers", peers)
	c.report.add(part, start, "ms", starts[0])
	row := c.report.add(part, program, "ms", programs[0])
	if c.base != "" {
		c.report.add(part, start+otherBuild, "ms", starts[1])
		c.report.add(part, program+otherBuild, "ms", programs[1])
		c.report.ratio(part, start, start+otherBuild, "<=", baseLimit)
		c.report.ratio(part, program, program+otherBuild, "<=", baseLimit)
	}
	return row, nil
}

func (c *config) coldStart(ctx context.Context, bin, url string, peers int) (start, program float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	// Every start is a host of its own, and so a peer of the later ones: the
	// routes are counted, so a few more do no harm. It has to come
	// with an address of its own too: an address belongs to its last agent for a while.
	c.hosts++
	host, err := c.lab.Host(ctx, fmt.Sprintf("p%dk%d", peers, c.hosts), byte(10+c.hosts))
	if err != nil {
		return 0, 0, err
	}
	defer host.Delete(context.WithoutCancel(ctx))
	entries, err := watchEntries(host.Netns)
	if err != nil {
		return 0, 0, err
	}
	defer entries.close()
	host.Bin = bin
	began := time.Now()
	if err := host.StartAgent(url); err != nil {
		return 0, 0, err
	}
	defer host.Proc.Kill()
	first, last, err := entries.until(ctx, peers)
	if err != nil {
		return 0, 0, err
	}
	return ms(last.Sub(began)), ms(last.Sub(first)), nil
}

const oneMoreSamples = 40

// oneMore measures from the answer to a new agent's registration to its route
// on an agent that has all the others.
func (c *config) oneMore(ctx context.Context, url string, client *http.Client, have int) error {
	host, err := c.lab.Host(ctx, "more", 200)
	if err != nil {
		return err
	}
	routes, err := watchEntries(host.Netns)
	if err != nil {
		return err
	}
	defer routes.close()
	if err := host.StartAgent(url); err != nil {
		return err
	}
	defer host.Proc.Kill()
	limited, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	if _, _, err := routes.until(limited, have); err != nil {
		return err
	}
	if err := host.WaitReady(ctx); err != nil {
		return err
	}
	routes.drain()
	var asking, joining, waits []float64
	for k := range oneMoreSamples {
		// Hosts join one by one; a storm is another measurement.
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
		asked := time.Now()
		if err := register(ctx, client, url, have+k); err != nil {
			return err
		}
		answered := time.Now()
		_, last, err := routes.until(limited, 1)
		if err != nil {
			return err
		}
		asking = append(asking, ms(answered.Sub(asked)))
		joining = append(joining, ms(last.Sub(asked)))
		// The agent may well be done when the answer has been read.
		waits = append(waits, max(0, ms(last.Sub(answered))))
	}
	const part, name = "convergence", "one more peer, 4,000 known: registered to programmed"
	c.report.add(part, "one more peer, 4,000 known: asked to registered", "ms", asking)
	c.report.add(part, "one more peer, 4,000 known: asked to programmed", "ms", joining)
	row := c.report.add(part, name, "ms", waits)
	c.report.goal(part, name+", p50 (ms)", "", row.P50, "<=", 5)
	c.report.goal(part, name+", p95 (ms)", "", row.P95, "<=", 25)
	return nil
}

// steady measures an agent that has 4,096 peers and nothing to do.
func steady(ctx context.Context, c *config) error {
	coord, err := c.lab.Node(ctx, "coord", 2)
	if err != nil {
		return err
	}
	coordinator, err := c.lab.StartCoordinator(ctx, coord, clusterYAML)
	if err != nil {
		return err
	}
	if _, err := registerMany(ctx, clientIn(coord, 32), coordinator.URL, 0, 4096, 32); err != nil {
		return err
	}
	host, err := c.lab.Host(ctx, "host", 3)
	if err != nil {
		return err
	}
	if err := c.startAgent(ctx, host, coordinator.URL); err != nil {
		return err
	}
	agent := host.Proc
	// Let the start settle, then measure over two rounds of every timer.
	const settle, window = 15 * time.Second, 130 * time.Second
	if err := pause(ctx, settle); err != nil {
		return err
	}
	before, err := cpuSeconds(agent.Pid())
	if err != nil {
		return err
	}
	if err := pause(ctx, window); err != nil {
		return err
	}
	after, err := cpuSeconds(agent.Pid())
	if err != nil {
		return err
	}
	rss, err := memory(agent.Pid(), "VmRSS")
	if err != nil {
		return err
	}
	const part = "steady state, 4,096 peers"
	c.report.add(part, "resident memory of the agent", "MiB", []float64{rss})
	c.report.goal(part, "resident memory of the agent (MiB)", "", rss, "<=", 40)
	c.report.goal(part, "idle CPU of the agent (% of a core)", "", 100*(after-before)/window.Seconds(), "<=", 0.2)
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
