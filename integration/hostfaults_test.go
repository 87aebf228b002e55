package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// repairTime is how long what belongs to a running container may be broken: a
// second from the kernel's notification, and as long again for a busy machine.
const repairTime = 2 * time.Second

// TestHealPorts: what is done to bridges and to the host ends of containers, by
// hand or by systemd-networkd, does not keep the containers cut off, also where
// no agent ran when it was done.
func TestHealPorts(t *testing.T) {
	t.Parallel()
	s := upSeed(t, seedConfig(t))
	ctx := t.Context()
	h := s.Agents[0]
	a := place(t, s, 0, "a", "dcos", lab.Docker)
	b := place(t, s, 1, "b", "dcos", lab.Mesos)
	waitPing(t, b.Netns, a.Addr(), 5*time.Second)
	// The bridge has its ports, and the container answers: with the fast path it
	// may do that without a bridge.
	whole := func(t *testing.T, within time.Duration) {
		t.Helper()
		start := time.Now()
		wait(t, "the container to be attached", within, func() error {
			out, err := h.Run(ctx, "ip", "-o", "link", "show", "master", "d-dcos", "up")
			if err != nil || !strings.Contains(out, ": vd") {
				return fmt.Errorf("ports of d-dcos: %q, %v", out, err)
			}
			out, err = b.Netns.Run(ctx, "ping", "-n", "-q", "-c", "1", "-W", "0.2", a.Addr().String())
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		t.Logf("repaired within %v", time.Since(start).Round(10*time.Millisecond))
	}
	const ports = "for p in $(ip -o link show type veth | grep -o 'vd[0-9a-f]*' | sort -u); do "
	for _, c := range []struct{ name, script string }{
		{"bridge deleted", "ip link delete d-dcos"},
		{"bridge with another MAC", "ip link set d-dcos address 02:00:00:00:00:07"},
		{"ports taken out", ports + "ip link set $p nomaster; done"},
		{"ports down", ports + "ip link set $p down; done"},
		{"ports in a foreign bridge", "ip link add br9 type bridge; " + ports + "ip link set $p master br9; done"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := h.Run(ctx, "sh", "-c", c.script)
			must(t, err)
			whole(t, repairTime)
		})
		t.Run(c.name+", agent restarted", func(t *testing.T) {
			h.Proc.Kill()
			_, err := h.Run(ctx, "sh", "-c", strings.ReplaceAll(c.script, "br9", "br8"))
			must(t, err)
			must(t, s.StartAgent(h))
			whole(t, 10*time.Second)
		})
	}
}

// TestHostNetworkStays: a host that has a network inside the range of an overlay
// keeps it, says so, and has the other overlays.
func TestHostNetworkStays(t *testing.T) {
	t.Parallel()
	s := newSeed(t, `
dcos_overlay_network:
  vtep_subnet: 44.128.0.0/20
  vtep_mac_oui: 70:B3:D5:00:00:00
  overlays:
    - {name: meets, subnet: 192.168.0.0/16, prefix: 24}
    - {name: clear, subnet: 9.0.0.0/8, prefix: 24}
`)
	ctx := t.Context()
	h := s.Agents[0]
	must(t, h.Configure(ctx, "link add eth1 type veth peer name lan1", "link set eth1 up", "link set lan1 up",
		"address add 192.168.0.12/24 dev eth1"))
	before, err := h.Run(ctx, "ip", "route", "get", "192.168.0.77")
	must(t, err)
	must(t, s.StartCoordinator(ctx))
	must(t, s.StartAgent(h))
	var said string
	wait(t, "the agent to say why", 15*time.Second, func() error {
		b, err := h.Get(ctx, "/overlay-agent/overlays")
		if said = string(b); err != nil || !strings.Contains(said, "eth1 has 192.168.0.12/24") {
			return fmt.Errorf("%v: %s", err, b)
		}
		return nil
	})
	if !strings.Contains(said, "route 192.168.0.0/24 dev eth1") {
		t.Errorf("the route is not named: %s", said)
	}
	links, err := h.Run(ctx, "ip", "-o", "link")
	must(t, err)
	if strings.Contains(links, "-meets") || !strings.Contains(links, "d-clear") {
		t.Errorf("links are\n%s", links)
	}
	if after, err := h.Run(ctx, "ip", "route", "get", "192.168.0.77"); err != nil || after != before {
		t.Errorf("the host's route was %q and is %q, %v", before, after, err)
	}
	must(t, h.Configure(ctx, "link delete eth1"))
	wait(t, "the overlay to be set up", repairTime, func() error {
		_, err := h.Run(ctx, "ip", "link", "show", "d-meets", "up")
		return err
	})
}
