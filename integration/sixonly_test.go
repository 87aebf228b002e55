package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// sixConfig is a cluster without any IPv4.
const sixConfig = `
dcos_overlay_network:
  vtep_subnet6: fd01:a::/64
  vtep_mac_oui: 70:B3:D5:00:00:00
  overlays:
    - {name: six, subnet6: "fd01:b::/64", prefix6: 80}
    - {name: half-dozen, subnet6: "fd01:c::/64", prefix6: 96}
`

// TestIPv6Only: neither the underlay nor an overlay nor a VTEP has IPv4.
func TestIPv6Only(t *testing.T) {
	t.Run("a reboot without the coordinator", func(t *testing.T) {
		t.Parallel()
		s := sixOnly(t, "kernel")
		h := s.Agents[0]
		s.Containers = slices.DeleteFunc(s.Containers, func(c *lab.Container) bool {
			if c.Host == h {
				must(t, c.Remove(t.Context()))
			}
			return c.Host == h
		})
		storesPeers(t, h, s.Master, s.Agents[1])
		s.Coordinator.Kill()
		reboot(t, h)
		restartAgents(t, s, []*lab.Host{h})
		must(t, s.WaitMesh(t.Context()))
		place(t, s, 0, "again", "six", lab.Mesos)
		place(t, s, 0, "again-too", "half-dozen", lab.Docker)
		checkTraffic(t, s)
	})
	t.Run("IPv4 is added", func(t *testing.T) {
		t.Parallel()
		addIPv4(t, sixOnly(t, "ebpf"))
	})
}

// sixOnly is a cluster whose containers talk, with what people ask of it.
func sixOnly(t *testing.T, datapath string) *lab.Seed {
	t.Helper()
	o := options()
	o.Secure = true
	s := makeSeed(t, sixConfig, o)
	for _, h := range s.Agents {
		h.Datapath = datapath
	}
	for _, n := range []*lab.Node{s.Master.Node, s.Agents[0].Node, s.Agents[1].Node, s.Outside} {
		must(t, n.DropIPv4(t.Context()))
	}
	must(t, s.Up(t.Context()))
	placeEverywhere(t, s, "six", "half-dozen")
	checkTraffic(t, s)

	h, other := s.Agents[0], s.Agents[1]
	state, err := s.Coordinator.Get(t.Context(), "/overlay-master/state")
	must(t, err)
	for _, want := range []string{`"vtep_ip":"","vtep_ip6":"fd01:a::3/64","vtep_mac":"72:b3:d5:00:00:03"`, `"vtep_subnet":""`} {
		if !strings.Contains(string(state), want) {
			t.Errorf("the state does not have %s:\n%s", want, state)
		}
	}
	storesPeers(t, h, s.Master, other)
	sound(t, h)
	rows := pings(t, h, "--all", "--here")
	if len(rows) != 2 || rows[1].To != other.IP6 || rows[1].Address.String() != "fd01:a::3" || rows[1].Received == 0 || rows[1].PathMTU != rows[1].MTU {
		t.Errorf("pings: %+v", rows)
	}
	from, to := s.Containers[0], s.Containers[len(s.Containers)/4]
	if e := explain(t, h, from.Addr().String(), to.Addr().String()); !e.Reachable {
		t.Errorf("%s to %s: %+v", from.Addr(), to.Addr(), e)
	}
	out, err := h.Run(t.Context(), filepath.Join(binDir, "overlayctl"), "peers", "--run-dir", h.RunDir)
	must(t, err)
	if !strings.Contains(string(out), "fd01:a::3") || strings.Contains(string(out), "invalid") {
		t.Errorf("overlayctl peers:\n%s", out)
	}
	out, err = s.Overlayctl(t.Context(), "agents")
	must(t, err)
	if !strings.Contains(out, "fd01:a::3") || strings.Contains(out, "invalid") {
		t.Errorf("overlayctl agents:\n%s", out)
	}
	return s
}

// addIPv4 has agents start again and then adds IPv4 to an overlay, and to the VTEPs,
// under pings that notice nothing of it.
func addIPv4(t *testing.T, s *lab.Seed) {
	n := &networks{Seed: s}
	a, b := s.Containers[0], place(t, s, 1, "b", "six", lab.Docker)
	c, d := place(t, s, 0, "c", "half-dozen", lab.Docker), place(t, s, 1, "d", "half-dozen", lab.Mesos)
	n.pairs = [][2]*lab.Container{{a, b}, {c, d}}
	for _, p := range n.pairs {
		waitPing(t, p[0].Netns, p[1].Addr(), 60*time.Second)
	}
	n.during(t, "agents start again", func(t *testing.T) {
		for _, h := range s.Agents {
			h.Proc.Kill()
		}
		restartAgents(t, s, s.Agents)
	})
	n.during(t, "vtep_subnet and subnet", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "overlay.yaml")
		write := func(vtep string) {
			both := strings.Replace(sixConfig, `subnet6: "fd01:b::/64"`, `subnet: 9.0.0.0/8, prefix: 24, subnet6: "fd01:b::/64"`, 1)
			must(t, os.WriteFile(file, []byte(strings.Replace(both, "  vtep_subnet6", vtep+"  vtep_subnet6", 1)), 0o644))
		}
		write("")
		if _, err := s.Overlayctl(t.Context(), "overlays", "apply", file); err == nil || !strings.Contains(err.Error(), "vtep_subnet: missing, but an overlay has subnet") {
			t.Errorf("without vtep_subnet: %v", err)
		}
		write("  vtep_subnet: 44.128.0.0/20\n")
		n.ctl(t, "apply", file)
		n.there(t, "six", `"subnet":"9.0.0.0/8"`)
		must(t, s.WaitMesh(t.Context()))
	})
	for _, h := range s.Hosts() {
		wait(t, "the VTEP of "+h.Name+" to have both addresses", 60*time.Second, func() error {
			v4, v6, err := h.VTEP()
			if err == nil && (!v4.Is4() || !v6.Is6()) {
				return fmt.Errorf("%s and %s", v4, v6)
			}
			return err
		})
	}
	state, err := s.Coordinator.Get(t.Context(), "/overlay-master/state")
	must(t, err)
	if want := regexp.MustCompile(`"vtep_ip":"44.128.0.[123]/20","vtep_ip6":"fd01:a::3/64","vtep_mac":"72:b3:d5:00:00:03"`); !want.Match(state) {
		t.Errorf("the state does not have %s:\n%s", want, state)
	}
	before := s.Containers
	s.Containers = nil
	for i := range s.Agents {
		both := place(t, s, i, fmt.Sprint("both-", i), "six", lab.Docker)
		if len(both.Addrs) != 2 {
			t.Errorf("%s has %v", both.Short, both.Addrs)
		}
	}
	checkTraffic(t, s)
	for _, c := range s.Containers {
		slices.Reverse(c.Addrs) // pairs take the first
	}
	s.Containers = append(s.Containers, before...)
	checkTraffic(t, s)
	sound(t, s.Agents[0])
}

// sound waits until doctor finds nothing but a plugin that this lab does not have.
func sound(t *testing.T, h *lab.Host) {
	t.Helper()
	wait(t, h.Name+" to be sound", 60*time.Second, func() error {
		for _, f := range doctor(t, h) {
			if f.Check != "portmap" {
				return fmt.Errorf("doctor finds %+v", f)
			}
		}
		return nil
	})
}
