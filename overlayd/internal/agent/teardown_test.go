package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/calls"
	"overlayd.internal/overlay/internal/mark"
)

// hostState is everything about the network of a host that people can look at.
func hostState(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, command := range []string{
		"ip -d link", "ip addr", "ip route show table all", "ip -6 route show table all", "ip rule", "ip -6 rule",
		"bridge fdb", "nft list ruleset", "iptables-save", "ip6tables-save",
	} {
		words := strings.Fields(command)
		out, err := exec.Command(words[0], words[1:]...).Output()
		must(t, err)
		fmt.Fprintf(&b, "== %s\n%s", command, out)
	}
	for _, pattern := range []string{"net/ipv4/ip_forward", "net/ipv*/conf/*/forwarding", "net/ipv6/conf/*/accept_ra", "net/ipv4/conf/*/rp_filter", "net/ipv6/conf/*/disable_ipv6"} {
		paths, err := filepath.Glob("/proc/sys/" + pattern)
		must(t, err)
		for _, path := range paths {
			v, err := os.ReadFile(path)
			must(t, err)
			fmt.Fprintf(&b, "%s %s", path, v)
		}
	}
	return changing.ReplaceAllString(b.String(), "")
}

// changing is what differs between two looks at the same host.
var changing = regexp.MustCompile(`(?m)^# (Generated|Completed).*$|\[\d+:\d+\]|packets \d+ bytes \d+|expires \d+sec|valid_lft \S+|preferred_lft \S+|#.*handle \d+|(hello|tcn|topology_change|gc)_timer +[0-9.]+|tx_queue \d+`)

// Teardown leaves a host with other people's devices, rules and files as it was
// before the first start of the agent.
func TestTeardown(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("peer", "172.17.0.3")
	h := newHost(c)
	for _, args := range []string{
		"link add br-lan type bridge", "link add d-lan type bridge", "link set br-lan up", "link add vx type vxlan id 7 dstport 4789 dev u0",
		"link add veth-x type veth peer name veth-y", "link set veth-x master br-lan", "addr add 192.168.77.1/24 dev br-lan",
		"route add 10.99.0.0/16 via 172.17.0.1", "route add 10.98.0.0/16 via 172.17.0.1 proto 4", "rule add from 10.99.0.1 table 100 priority 500",
		"-6 route add fd88::/64 dev u0",
	} {
		ipCmd(t, args)
	}
	foreign := filepath.Join(h.opts.CNIConfDir, "10-other.conflist")
	must(t, os.MkdirAll(h.opts.CNIConfDir, 0o755))
	must(t, os.WriteFile(foreign, []byte(`{"name":"other","plugins":[{"type":"bridge"}]}`), 0o644))
	for _, rule := range []string{
		"iptables -A FORWARD -s 10.99.0.0/16 -j ACCEPT", "iptables -N MINE", "ip6tables -A INPUT -p tcp --dport 22 -j ACCEPT",
		"iptables -t nat -A POSTROUTING -s 10.99.0.0/16 -j MASQUERADE", "nft add table inet theirs", "nft add set inet theirs hosts { type ipv4_addr; }",
	} {
		words := strings.Fields(rule)
		if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", rule, err, out)
		}
	}
	var before string
	eventually(t, "all addresses are in use", func() error {
		if before = hostState(t); strings.Contains(before, "tentative") {
			return errors.New("some are being probed")
		}
		return nil
	})

	h.start()
	h.ready()
	eventually(t, "peer", func() error { return hasRoute(prefix("9.0.0.0/24")) })
	if err := Teardown(t.Context(), h.opts, true); err == nil || !strings.Contains(err.Error(), "another agent (process") {
		t.Errorf("while the agent runs: %v", err)
	}
	h.restart() // the sysctls of before are those of before the first start
	h.ready()
	h.stop()

	// A container, and a port that is none of ours.
	bridge, err := netlink.LinkByName("d-dcos")
	must(t, err)
	a := conf.Attachment{Network: "dcos", ContainerID: "web1", IfName: "eth0"}
	alias := mark.NewAlias("dcos", conf.Docker, a, []netip.Addr{addr("9.0.1.130")}, time.Minute)
	end := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: mark.HostEnd(conf.Docker, alias.Key()), MasterIndex: bridge.Attrs().Index}, PeerName: "inside"}
	must(t, netlink.LinkAdd(end))
	must(t, netlink.LinkSetAlias(end, alias.String()))
	during := hostState(t)
	err = Teardown(t.Context(), h.opts, false)
	if err == nil || !strings.Contains(err.Error(), "container web1 (eth0 of overlay dcos") || !strings.Contains(err.Error(), "--force") {
		t.Errorf("with a container: %v", err)
	}
	if diff := cmp.Diff(during, hostState(t)); diff != "" {
		t.Errorf("a refused teardown changed something:\n%s", diff)
	}
	must(t, exists(filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist"), true))

	calls.Record(h.opts.RunDir, calls.Call{Program: "d-overlay", Verb: "ADD"})
	must(t, os.WriteFile(h.path(conf.CAFile), []byte("CA"), 0o644))
	must(t, os.WriteFile(h.path(conf.AttachmentsFile), nil, 0o600))
	must(t, Teardown(t.Context(), h.opts, true))
	if diff := cmp.Diff(before, hostState(t)); diff != "" {
		t.Errorf("after teardown (-before +after):\n%s", diff)
	}
	must(t, errors.Join(
		exists(foreign, true), exists(filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist"), false),
		exists(filepath.Join(h.opts.UCRConfDir, "dcos.conf"), false), exists(h.opts.RunDir, false),
		exists(h.stored(leaseFile), false), exists(h.stored(peersFile), false), exists(h.stored(idFile), true),
	))
	// Twice is as good as once, also where there was never an agent.
	must(t, Teardown(t.Context(), h.opts, false))
	never := newHost(c)
	must(t, Teardown(t.Context(), never.opts, false))
	must(t, errors.Join(exists(never.opts.RunDir, false), exists(never.opts.CNIConfDir, false)))

	// And the host can come back, as itself.
	id := h.id()
	h.start()
	h.ready()
	if h.id() != id {
		t.Error("it is another host")
	}
}
