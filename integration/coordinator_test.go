package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// lease is what the tests read of the answer to a registration.
type lease struct {
	Epoch uint64
	VTEP  struct {
		IP, IP6 netip.Prefix
		MAC     string
	}
	Overlays []struct {
		Overlay         struct{ Name string }
		Subnet, Subnet6 netip.Prefix
		Error           string
	}
}

// granted is the part of a lease that must never change.
func (l lease) granted() string {
	var b strings.Builder
	fmt.Fprint(&b, l.VTEP.IP, " ", l.VTEP.IP6, " ", l.VTEP.MAC)
	for _, o := range l.Overlays {
		fmt.Fprint(&b, " ", o.Overlay.Name, " ", o.Subnet, " ", o.Subnet6)
	}
	return b.String()
}

// register asks the coordinator for a lease as an agent does.
func register(ctx context.Context, n *lab.Node, url, id string, ip netip.Addr) (l lease, err error) {
	body, err := json.Marshal(map[string]any{"agent_id": id, "agent_ip": ip, "bridges": []string{lab.Mesos, lab.Docker}, "version": "test"})
	if err != nil {
		return l, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/v1/register", bytes.NewReader(body))
	if err != nil {
		return l, err
	}
	req.Header.Set("Content-Type", "application/json")
	res, err := n.HTTP().Do(req)
	if err != nil {
		return l, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return l, err
	}
	if res.StatusCode != http.StatusOK {
		return l, fmt.Errorf("%s: %s", res.Status, b)
	}
	return l, json.Unmarshal(b, &l)
}

// TestCoordinatorKilled: agents register while the coordinator is killed and
// started again and again. What one was told stays so, and no two get the same.
func TestCoordinatorKilled(t *testing.T) {
	s := newSeed(t, seedConfig(t))
	ctx := t.Context()
	must(t, s.StartCoordinator(ctx))

	const agents, kills = 120, 6
	id := func(i int) string { return fmt.Sprintf("agent-%03d", i) }
	ip := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
	leases := make([]lease, agents)
	retries := make([]int, agents)
	errs := make([]error, agents)
	turn := make(chan struct{}, 8)
	told := make(chan struct{}, agents)
	var wg sync.WaitGroup
	for i := range agents {
		wg.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn; told <- struct{}{} }()
			errs[i] = lab.Wait(ctx, "a lease for "+id(i), time.Minute, func() (err error) {
				leases[i], err = register(ctx, s.Master.Node, s.Coordinator.URL, id(i), ip(i))
				if err != nil {
					retries[i]++
				}
				return err
			})
		})
	}
	for range kills {
		for range agents / (kills + 2) {
			<-told
		}
		s.Coordinator.Kill()
		must(t, s.Coordinator.Restart(ctx))
	}
	wg.Wait()
	must(t, errors.Join(errs...))

	owner := map[string]string{}
	take := func(what fmt.Stringer, by string) {
		if o, taken := owner[what.String()]; taken {
			t.Errorf("%s has been given to %s and to %s", what, o, by)
		}
		owner[what.String()] = by
	}
	again := 0
	for i, l := range leases {
		take(l.VTEP.IP.Addr(), id(i))
		take(l.VTEP.IP6.Addr(), id(i))
		for _, o := range l.Overlays {
			for _, p := range []netip.Prefix{o.Subnet, o.Subnet6} {
				if p.IsValid() {
					take(p, id(i))
				}
			}
		}
		now, err := register(ctx, s.Master.Node, s.Coordinator.URL, id(i), ip(i))
		must(t, err)
		if now.granted() != l.granted() {
			t.Errorf("%s was told %s and now %s", id(i), l.granted(), now.granted())
		}
		again += retries[i]
	}
	if len(owner) != agents*4 {
		t.Errorf("%d things were leased to %d agents, want 4 each", len(owner), agents)
	}
	if again == 0 {
		t.Error("no registration met a dead coordinator")
	}

	// Nothing was lost on the way: the pools have no holes.
	var vteps []netip.Addr
	for _, l := range leases {
		vteps = append(vteps, l.VTEP.IP.Addr())
	}
	slices.SortFunc(vteps, netip.Addr.Compare)
	if first, last := vteps[0], vteps[agents-1]; first != netip.MustParseAddr("44.128.0.1") || last != netip.MustParseAddr(fmt.Sprintf("44.128.0.%d", agents)) {
		t.Errorf("VTEP addresses go from %s to %s; want 44.128.0.1 to 44.128.0.%d", first, last, agents)
	}
	t.Logf("%d agents, %d kills, %d attempts met a dead coordinator", agents, kills, again)
}

// TestSignals: whatever ends a program on purpose, of an agent the closing of its
// terminal too, ends it in order. A coordinator reads its file again then, also one
// that was told to outlive its terminal.
func TestSignals(t *testing.T) {
	t.Parallel()
	// Programs inherit what is ignored, and the tests may run under nohup. What is
	// caught they do not.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, syscall.SIGHUP)
	defer signal.Stop(caught)

	s := newSeed(t, seedConfig(t))
	ctx := t.Context()
	must(t, s.StartCoordinator(ctx))
	h := s.Agents[0]
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		must(t, s.StartAgent(h))
		must(t, h.WaitReady(ctx))
		must(t, h.Proc.StopBy(sig))
		if sig == syscall.SIGHUP {
			must(t, syscall.Kill(s.Coordinator.Pid(), sig))
			wait(t, "it to read its file", 10*time.Second, func() error { return s.Coordinator.LogContains("as it was read again") })
			continue
		}
		must(t, s.Coordinator.StopBy(sig))
		must(t, s.Coordinator.Restart(ctx))
	}
	config := filepath.Join(s.Dir, "stays.yaml")
	must(t, os.WriteFile(config, []byte(seedConfig(t)), 0o644))
	stays, err := s.Lab.Start(s.Master.Netns, "stays", "nohup", filepath.Join(s.Lab.Bin, "overlayd"), "coordinator",
		"--insecure", "--config", config, "--state-dir", t.TempDir(), "--listen", "127.0.0.1:0")
	must(t, err)
	wait(t, "it to listen", 10*time.Second, func() error { return stays.LogContains("listening") })
	must(t, syscall.Kill(stays.Pid(), syscall.SIGHUP))
	wait(t, "it to read its file", 10*time.Second, func() error { return stays.LogContains("as it was read again") })
	must(t, stays.Stop())
}

// TestPools: who finds a pool empty learns which one, the others go on.
func TestPools(t *testing.T) {
	t.Parallel()
	t.Run("vtep", func(t *testing.T) {
		s := newSeed(t, strings.Replace(seedConfig(t), "44.128.0.0/20", "44.128.0.0/30", 1))
		ctx := t.Context()
		must(t, s.StartCoordinator(ctx))
		for _, h := range s.Hosts() {
			must(t, s.StartAgent(h))
			if h == s.Agents[1] {
				break
			}
			must(t, h.WaitRegistered(ctx, s.Coordinator))
		}
		last := s.Agents[1]
		wait(t, "the last agent to say that the VTEP pool is exhausted", 20*time.Second, func() error {
			return last.Proc.LogContains("vtep_subnet", "44.128.0.0/30")
		})
		must(t, lab.WaitMesh(ctx, s.Master, s.Agents[0]))
		a := place(t, s, 0, "a", "dcos", lab.Mesos)
		waitPing(t, s.Master.Netns, a.Addr(), 5*time.Second)
		if last.Proc.Fate() != "running" {
			t.Errorf("the agent without a lease: %s", last.Proc.Fate())
		}
	})

	t.Run("overlay", func(t *testing.T) {
		s := newSeed(t, `
dcos_overlay_network:
  vtep_subnet: 44.128.0.0/20
  vtep_subnet6: fd01:a::/64
  vtep_mac_oui: 70:B3:D5:00:00:00
  overlays:
    - {name: tiny, subnet: 9.0.0.0/24, prefix: 25}
    - {name: roomy, subnet: 10.0.0.0/8, prefix: 24}
`)
		ctx := t.Context()
		must(t, s.StartCoordinator(ctx))
		for _, h := range s.Hosts()[:2] {
			must(t, s.StartAgent(h))
			must(t, h.WaitRegistered(ctx, s.Coordinator))
		}
		last := s.Agents[1]
		must(t, s.StartAgent(last))
		wait(t, "the last agent's overlays", 20*time.Second, func() error {
			st, err := s.Coordinator.State(ctx)
			if err != nil {
				return err
			}
			if len(st.Agents) != 3 {
				return fmt.Errorf("%d agents registered", len(st.Agents))
			}
			for _, o := range st.Agents[2].Overlays {
				want := map[string]string{"tiny": "STATUS_FAILED", "roomy": "STATUS_OK"}[o.Info.Name]
				if o.State.Status != want {
					return fmt.Errorf("overlay %s: %q", o.Info.Name, o.State.Status)
				}
				if o.Info.Name == "tiny" && (!strings.Contains(o.State.Error, "tiny") || !strings.Contains(o.State.Error, "9.0.0.0/24")) {
					return fmt.Errorf("overlay tiny: error %q; want one that names the overlay and its subnet", o.State.Error)
				}
			}
			return nil
		})
		wait(t, "the log to name the pool", 5*time.Second, func() error { return last.Proc.LogContains("tiny", "9.0.0.0/24") })
		must(t, s.WaitMesh(ctx))
		a := place(t, s, 0, "a", "roomy", lab.Mesos)
		b := place(t, s, 1, "b", "roomy", lab.Docker)
		c := place(t, s, 0, "c", "tiny", lab.Docker)
		waitPing(t, a.Netns, b.Addr(), 5*time.Second)
		waitPing(t, s.Master.Netns, c.Addr(), 5*time.Second)
	})
}

// TestOverlayAdded: an overlay that the configuration gains is given to every
// agent there is, without a restart of the agents.
func TestOverlayAdded(t *testing.T) {
	t.Parallel()
	const config = `
dcos_overlay_network:
  vtep_subnet: 44.128.0.0/20
  vtep_mac_oui: 70:B3:D5:00:00:00
  overlays:
    - {name: first, subnet: 9.0.0.0/8, prefix: 24}
`
	s := upSeed(t, config)
	ctx := t.Context()
	must(t, s.Coordinator.Stop())
	must(t, s.Coordinator.Reconfigure(ctx, config+"    - {name: late, subnet: 10.0.0.0/8, prefix: 24}\n"))
	wait(t, "every agent to have the overlay", 60*time.Second, func() error {
		for _, h := range s.Hosts() {
			p, err := h.Published()
			if err != nil {
				return err
			}
			if len(p.Overlays) != 2 {
				return fmt.Errorf("%s has %d overlays", h.Name, len(p.Overlays))
			}
			// The files of the runtimes come after the published state, so that no
			// runtime finds an overlay before its plugins do.
			if h == s.Master {
				continue // it has no bridges, and no files
			}
			for _, file := range []string{filepath.Join(h.CNIConfDir, "87-late.conflist"), filepath.Join(h.UCRConfDir, "late.conf")} {
				if _, err := os.Stat(file); err != nil {
					return err
				}
			}
		}
		return nil
	})
	must(t, s.WaitMesh(ctx))
	a := place(t, s, 0, "a", "late", lab.Mesos)
	b := place(t, s, 1, "b", "late", lab.Docker)
	waitPing(t, a.Netns, b.Addr(), 5*time.Second)
}
