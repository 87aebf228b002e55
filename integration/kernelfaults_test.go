package integration

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/integration/lab"
)

// TestWithoutIPv6: an agent that finds no IPv6 in its kernel has the IPv4 overlays,
// and says of the others what is missing.
func TestWithoutIPv6(t *testing.T) {
	t.Parallel()
	s := newSeed(t, seedConfig(t))
	ctx := t.Context()
	h, other := s.Agents[0], s.Agents[1]
	h.Bin = withoutIPv6(t)
	must(t, s.StartCoordinator(ctx))
	for _, a := range s.Agents {
		must(t, s.StartAgent(a))
	}
	must(t, other.WaitReady(ctx))
	wait(t, "the overlay with IPv4 to be there, and the other to say why not", 60*time.Second, func() error {
		said := map[string]string{}
		p, err := h.Published()
		for _, o := range p.Overlays {
			said[o.Info.Name] = o.State.Status + " " + o.State.Error
		}
		if err != nil || said["dcos"] != "STATUS_OK " || !strings.Contains(said["dcos6"], "this kernel has no IPv6") {
			return fmt.Errorf("%v, %v; the agent: %s", said, err, h.Proc.Fate())
		}
		_, err = os.Stat(filepath.Join(h.CNIConfDir, "87-dcos.conflist")) // the runtimes come to know of it last
		return err
	})
	a := place(t, s, 0, "a", "dcos", lab.Docker)
	b := place(t, s, 1, "b", "dcos", lab.Mesos)
	waitPing(t, a.Netns, b.Addr(), 60*time.Second)
	waitPing(t, b.Netns, a.Addr(), 60*time.Second)
	if c, err := h.Attach(ctx, "c", "dcos6", lab.Mesos); err == nil {
		t.Error("a container is attached to an overlay that is not there")
		must(t, c.Remove(ctx))
	}
	if fate := h.Proc.Fate(); fate != "running" {
		t.Errorf("the agent: %s", fate)
	}
}

// withoutIPv6 has the programs, of which overlayd finds what a kernel that was started
// with ipv6.disable=1 shows: none of the settings of IPv6.
func withoutIPv6(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	programs, err := os.ReadDir(binDir)
	must(t, err)
	for _, p := range programs {
		if p.Name() != "overlayd" {
			must(t, os.Symlink(filepath.Join(binDir, p.Name()), filepath.Join(dir, p.Name())))
		}
	}
	script := fmt.Sprintf("#!/bin/sh\nexec unshare -m sh -c 'mount -t tmpfs none /proc/sys/net/ipv6 && exec \"$0\" \"$@\"' %s \"$@\"\n", filepath.Join(binDir, "overlayd"))
	must(t, os.WriteFile(filepath.Join(dir, "overlayd"), []byte(script), 0o755))
	return dir
}

// TestConntrackFull: on a host whose table of connections is full the agent goes on,
// doctor names it, containers are attached and talk. It is for the soak: the table is
// as large as the machine's.
func TestConntrackFull(t *testing.T) {
	if !*full {
		return // a quarter of a million connections
	}
	s := doctorSeed(t) // of which doctor has nothing to say otherwise
	ctx := t.Context()
	h := s.Agents[0]
	a := place(t, s, 0, "a", "dcos", lab.Docker)
	b := place(t, s, 1, "b", "dcos", lab.Mesos)
	waitPing(t, a.Netns, b.Addr(), 60*time.Second)
	fillConntrack(t, h)
	wantFindings(t, h, nil, "conntrack-full")
	waitPing(t, a.Netns, b.Addr(), 60*time.Second)
	c := place(t, s, 0, "c", "dcos", lab.Mesos)
	waitPing(t, c.Netns, b.Addr(), 60*time.Second)
	waitPing(t, c.Netns, s.Outside.IP, 60*time.Second)
	must(t, c.Del(ctx))
	h.Proc.Kill()
	restartAgents(t, s, []*lab.Host{h})
	if _, err := h.Run(ctx, "conntrack", "-F"); err != nil {
		t.Error(err)
	}
	healthy(t, h)
}

// fillConntrack fills the table of a host, whose limit is the machine's.
func fillConntrack(t *testing.T, h *lab.Host) {
	t.Helper()
	number := func(key string) int {
		out, err := h.Run(t.Context(), "cat", "/proc/sys/net/netfilter/"+key)
		must(t, err)
		n, err := strconv.Atoi(strings.TrimSpace(out))
		must(t, err)
		return n
	}
	limit := number("nf_conntrack_max")
	tuple := func(from, to net.IP) netlink.IPTuple {
		return netlink.IPTuple{SrcIP: from, DstIP: to, SrcPort: 9, DstPort: 9, Protocol: unix.IPPROTO_UDP}
	}
	err := ns.WithNetNSPath(h.Path, func(ns.NetNS) error {
		c, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer c.Close()
		to := net.IPv4(192, 0, 2, 1).To4()
		for i := range limit {
			from := net.IPv4(100, 64|byte(i>>16), byte(i>>8), byte(i)).To4()
			flow := &netlink.ConntrackFlow{FamilyType: unix.AF_INET, TimeOut: 600, Forward: tuple(from, to), Reverse: tuple(to, from)}
			if err := c.ConntrackCreate(netlink.ConntrackTable, unix.AF_INET, flow); err != nil {
				return fmt.Errorf("connection %d of %d: %w", i, limit, err)
			}
		}
		return nil
	})
	count := number("nf_conntrack_count")
	t.Logf("%d connections of %d: %v", count, limit, err)
	if count < limit*99/100 {
		t.Fatalf("%d connections of %d: %v", count, limit, err)
	}
}
