package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// fourBlocks has as many agent subnets as there are hosts, and one more.
const fourBlocks = `
dcos_overlay_network:
  vtep_subnet: 44.128.0.0/20
  vtep_mac_oui: 70:B3:D5:00:00:00
  overlays:
    - {name: dcos, subnet: 9.0.0.0/22, prefix: 24}
`

const day = 24 * time.Hour

// partition cuts a host off from all coordinators until the function that it returns
// is called.
func (c cluster) partition(t *testing.T, h *lab.Host) (heal func()) {
	t.Helper()
	return drops(t, h, fmt.Sprintf("in tcp sport %d drop", lab.CoordinatorPort), fmt.Sprintf("out tcp dport %d drop", lab.CoordinatorPort))
}

// sleeps has so much time pass on a host, as CLOCK_BOOTTIME has it, with its agent
// started again behind it.
func (c cluster) sleeps(t *testing.T, h *lab.Host, later time.Duration) {
	t.Helper()
	h.Proc.Kill()
	h.Later += later
	must(t, c.StartAgent(h))
}

// refuses waits until a host says why it is not ready, and sees it attach nothing.
func (c cluster) refuses(t *testing.T, h *lab.Host, name, why string) {
	t.Helper()
	wait(t, h.Name+" to say "+why, 20*time.Second, func() error {
		_, err := h.Get(t.Context(), "/readyz")
		if err == nil || !strings.Contains(err.Error(), why) {
			return fmt.Errorf("readiness: %v", err)
		}
		return nil
	})
	x, err := h.Attach(t.Context(), name, "dcos", lab.Mesos)
	if err == nil {
		t.Errorf("a container was attached with %s", x.Addr())
	}
	must(t, x.Delete(t.Context()))
}

// coordinatorsLater has so much time pass for the coordinators, which do not run
// meanwhile: what they count terms by is how long they have been at work in all, and
// that is in the store.
func (c cluster) coordinatorsLater(t *testing.T, later time.Duration) {
	t.Helper()
	ctx := t.Context()
	must(t, c.Second.Stop())
	must(t, c.Coordinator.Stop())
	out, err := c.Coordinator.Etcdctl(ctx, "get", "--prefix", "/overlay/coordinators/")
	must(t, err)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		var beat map[string]any
		must(t, json.Unmarshal([]byte(lines[i+1]), &beat))
		clock, _ := beat["clock"].(float64)
		beat["clock"] = int64(clock) + int64(later.Seconds())
		b, err := json.Marshal(beat)
		must(t, err)
		_, err = c.Coordinator.Etcdctl(ctx, "put", lines[i], string(b))
		must(t, err)
	}
	must(t, c.Coordinator.Restart(ctx))
	must(t, c.Second.Restart(ctx))
}

// TestPartition is the fault agent-partition of days: real programs, two coordinators
// on etcd, and time that passes in a time namespace of the host. Behind the end of its
// term the host attaches nothing, forwards, and goes on when it is heard again. Behind
// term and grace its subnet is another's, when nothing else is left: it withdraws, its
// containers stay, and its peers send to the new owner and to nobody else.
func TestPartition(t *testing.T) {
	t.Parallel()
	o := options()
	o.Secure, o.Etcd = true, true
	c := cluster{Seed: makeSeed(t, fourBlocks, o)}
	ctx := t.Context()
	must(t, c.Up(ctx))
	// The second coordinator is on the first agent's host; the other one is cut off.
	h, peer := c.Agents[1], c.Agents[0]
	c.a, c.b = place(t, c.Seed, 1, "a", "dcos", lab.Docker), place(t, c.Seed, 0, "b", "dcos", lab.Docker)
	neighbour := place(t, c.Seed, 1, "n", "dcos", lab.Docker)
	waitPing(t, c.a.Netns, c.b.Addr(), healTime)
	held, before := holds(t, h), epoch(t, h)

	t.Run("behind the term", func(t *testing.T) {
		c.unbroken(t, func() {
			heal := c.partition(t, h)
			c.sleeps(t, h, 2*day)
			c.refuses(t, h, "late", "could not be renewed in time")
			heal()
			wait(t, "it to go on", time.Minute, func() error { _, err := h.Get(ctx, "/readyz"); return err })
			extra := c.attach(t, 1, "again", lab.Mesos)
			waitPing(t, extra.Netns, c.b.Addr(), healTime)
			must(t, extra.Remove(ctx))
		})
		if now := holds(t, h); now != held || epoch(t, h) != before {
			t.Errorf("it has\n%s and had\n%s; epoch %d and %d", now, held, epoch(t, h), before)
		}
	})
	t.Run("behind term and grace", func(t *testing.T) {
		// It is noted when the host was seen last; without that it would be two minutes
		// after the next start of the coordinators.
		noted := func(gone bool) func() error {
			return func() error {
				out, err := c.Coordinator.Etcdctl(ctx, "get", "--prefix", "/overlay/seen/")
				if err != nil || strings.Contains(out, `"clock"`) != gone {
					return fmt.Errorf("%v: %s", err, out)
				}
				return nil
			}
		}
		// It was gone before, until a moment ago, and that was noted as well.
		wait(t, "the coordinators to note that it is back", 20*time.Second, noted(false))
		h.Proc.Kill()
		wait(t, "a coordinator to note that it has gone", 20*time.Second, noted(true))
		heal := c.partition(t, h)
		c.sleeps(t, h, 8*day)
		c.refuses(t, h, "later", "could not be renewed in time")
		c.coordinatorsLater(t, 8*day)
		s, err := h.Published()
		must(t, err)
		subnet := s.Overlays[0].Subnet
		// One takes the block that is left, another one that of the lost host.
		var owner *lab.Host
		for n := byte(70); owner == nil && n < 73; n++ {
			x, err := c.Host(ctx, fmt.Sprintf("x%d", n), n)
			must(t, err)
			must(t, c.StartAgent(x))
			t.Cleanup(x.Proc.Kill)
			must(t, x.WaitReady(ctx))
			if s, err = x.Published(); err == nil && s.Overlays[0].Subnet == subnet {
				owner = x
			}
		}
		if owner == nil {
			t.Fatalf("nobody got %s", subnet)
		}
		hop := func() (string, error) { return peer.Run(ctx, "ip", "route", "show", subnet.String()) }
		vtep, _, err := owner.VTEP()
		must(t, err)
		wait(t, "the peer to send to the new owner", 20*time.Second, func() error {
			route, err := hop()
			if err != nil || !strings.Contains(route, "via "+vtep.String()+" ") {
				return fmt.Errorf("%v: %s", err, route)
			}
			return nil
		})
		changes, err := c.Start(peer.Netns, "monitor", "ip", "monitor", "route")
		must(t, err)
		heal()
		wait(t, "it to withdraw", time.Minute, func() error {
			b, err := h.Get(ctx, "/overlay-agent/overlay")
			if err != nil || !strings.Contains(string(b), "was granted to another host") {
				return fmt.Errorf("%v: %s", err, b)
			}
			return nil
		})
		waitPing(t, c.a.Netns, neighbour.Addr(), healTime) // they go on among themselves
		placed, err := owner.Attach(ctx, "new", "dcos", lab.Docker)
		must(t, err)
		waitPing(t, c.b.Netns, placed.Addr(), healTime)
		changes.Kill()
		if err := changes.LogContains(subnet.String()); err == nil {
			t.Errorf("the peer's route to %s changed while both were there", subnet)
		}
		must(t, placed.Remove(ctx))
	})
}
