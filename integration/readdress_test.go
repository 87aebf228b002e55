package integration

import (
	"context"
	"fmt"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// wholeAgain is how long traffic may take to be whole again after hosts have come
// back with other addresses.
const wholeAgain = 5 * time.Second

// readdressed are two hosts that find their own addresses, with a container each,
// and a third that sends to them.
type readdressed struct {
	*lab.Seed
	hosts        [2]*lab.Host
	at           [2]*lab.Container
	third        *lab.Container
	held         [2]string
	epochs       [2]uint64
	agentsBefore int
}

func startReaddressed(t *testing.T, etcd bool) *readdressed {
	t.Helper()
	o := options()
	o.Secure, o.Etcd = true, etcd
	r := &readdressed{Seed: makeSeed(t, seedConfig(t), o)}
	ctx := t.Context()
	must(t, r.StartCoordinator(ctx))
	for i, name := range []string{"one", "two"} {
		h, err := r.Host(ctx, name, byte(60+i))
		must(t, err)
		h.FindsIP = true
		r.hosts[i] = h
		must(t, r.StartAgent(h))
	}
	must(t, r.StartAgent(r.Agents[1]))
	for i, h := range r.hosts {
		must(t, h.WaitReady(ctx))
		c, err := h.Attach(ctx, "c", "dcos", lab.Docker)
		must(t, err)
		r.at[i] = c
		t.Cleanup(func() { c.Remove(context.Background()) })
		r.held[i], r.epochs[i] = holds(t, h), epoch(t, h)
	}
	must(t, r.Agents[1].WaitReady(ctx))
	r.third = place(t, r.Seed, 1, "third", "dcos", lab.Mesos)
	r.reach(t, healTime)
	r.agentsBefore = r.agents(t)
	return r
}

func (r *readdressed) agents(t *testing.T) int {
	t.Helper()
	s, err := r.Coordinator.State(t.Context())
	must(t, err)
	return len(s.Agents)
}

// reach waits until all three containers reach each other.
func (r *readdressed) reach(t *testing.T, within time.Duration) {
	t.Helper()
	all := []*lab.Container{r.at[0], r.at[1], r.third}
	for _, from := range all {
		for _, to := range all {
			if from != to {
				wait(t, fmt.Sprintf("%s to answer %s", to.Name, from.Name), within, func() error {
					_, err := from.Netns.Run(t.Context(), "ping", "-n", "-q", "-c", "1", "-W", "0.2", to.Addr().String())
					return err
				})
			}
		}
	}
}

// kept says that nobody holds anything else than before, and nobody is there twice.
func (r *readdressed) kept(t *testing.T, changed ...int) {
	t.Helper()
	for _, i := range changed {
		h := r.hosts[i]
		wait(t, h.Name+" to be ready", 20*time.Second, func() error { _, err := h.Get(t.Context(), "/readyz"); return err })
		if now := holds(t, h); now != r.held[i] {
			t.Errorf("%s has\n%s and had\n%s", h.Name, now, r.held[i])
		}
		if now := epoch(t, h); now <= r.epochs[i] {
			t.Errorf("the epoch of %s was %d and is %d, so peers would not follow", h.Name, r.epochs[i], now)
		}
		r.epochs[i] = epoch(t, h)
	}
	if now := r.agents(t); now != r.agentsBefore {
		t.Errorf("there were %d agents and are %d", r.agentsBefore, now)
	}
}

// give has a host have another address than before, as from DHCP.
func give(t *testing.T, h *lab.Host, was, is string) {
	t.Helper()
	must(t, h.Configure(t.Context(), "address delete "+was+"/16 dev eth0", "address add "+is+"/16 dev eth0"))
}

// TestReaddressed: hosts come back with other addresses, under real agents, on either
// store. They keep their leases, and everybody sends to where they are.
func TestReaddressed(t *testing.T) {
	for _, store := range []string{"bbolt", "etcd"} {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			r := startReaddressed(t, store == "etcd")
			t.Run("addresses-exchanged", r.exchange)
			t.Run("agent-re-ip", r.another)
		})
	}
}

// The address of a host is replaced by another while its agent runs.
func (r *readdressed) another(t *testing.T) {
	h := r.hosts[0]
	was := h.IP
	h.IP = h.IP.Next().Next().Next()
	began := time.Now()
	give(t, h, was.String(), h.IP.String())
	r.reach(t, 30*time.Second)
	t.Logf("whole again after %v", time.Since(began).Round(time.Millisecond))
	r.kept(t, 0)
}

// After a power cut two hosts have each other's address. Nobody has been told that
// they went: connections of theirs are still there for the coordinator.
func (r *readdressed) exchange(t *testing.T) {
	a, b := r.hosts[0], r.hosts[1]
	var power []func()
	for _, h := range r.hosts {
		power = append(power, drops(t, h, "in iif eth0 drop", "out oif eth0 drop"))
		h.Proc.Kill()
	}
	give(t, a, a.IP.String(), b.IP.String())
	give(t, b, b.IP.String(), a.IP.String())
	a.IP, b.IP = b.IP, a.IP
	for _, on := range power {
		on()
	}
	began := time.Now()
	must(t, r.StartAgent(a))
	must(t, r.StartAgent(b))
	r.reach(t, 30*time.Second)
	took := time.Since(began)
	t.Logf("whole again %v after both were started", took.Round(time.Millisecond))
	if took > wholeAgain {
		t.Errorf("traffic is whole again after %v, want %v", took, wholeAgain)
	}
	r.kept(t, 0, 1)
}
