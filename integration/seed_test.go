package integration

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

func checkSeedState(t *testing.T, s *lab.Seed) {
	t.Helper()
	want, err := os.ReadFile("testdata/seed-state.json")
	must(t, err)
	var diff string
	err = lab.Wait(t.Context(), "the seed's state", 10*time.Second, func() error {
		got, err := s.Coordinator.Get(t.Context(), "/overlay-master/state")
		if err != nil {
			return err
		}
		if diff = lab.DiffState(got, want); diff != "" {
			return errors.New("it differs")
		}
		return nil
	})
	if err != nil {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

// TestSeed goes through the life of the seed's cluster: the state it shows, then
// the traffic while everything runs, without the coordinator, after every agent
// was killed and started again without the coordinator, and after all that.
func TestSeed(t *testing.T) {
	t.Parallel()
	s := upSeed(t, seedConfig(t))
	ctx := t.Context()

	t.Run("state", func(t *testing.T) { checkSeedState(t, s) })
	must(t, s.PlaceAll(ctx))
	t.Run("traffic", func(t *testing.T) { checkTraffic(t, s) })

	t.Run("coordinator killed", func(t *testing.T) {
		s.Coordinator.Kill()
		checkTraffic(t, s)
		c, err := s.Agents[1].Attach(ctx, "late", "dcos", lab.Docker)
		must(t, err)
		_, err = c.Ping(ctx, s.Containers[0].Addr(), 3)
		must(t, err)
		must(t, c.Remove(ctx))
	})

	t.Run("agents killed too", func(t *testing.T) {
		for _, h := range s.Hosts() {
			h.Proc.Kill()
		}
		checkTraffic(t, s)
		for _, half := range []string{lab.Mesos, lab.Docker} {
			c, err := s.Agents[0].Attach(ctx, "orphan", "dcos6", half)
			must(t, err)
			_, err = c.Ping(ctx, s.Containers[len(s.Containers)-1].Addr(), 3)
			must(t, err)
			must(t, c.Remove(ctx))
		}
	})

	t.Run("agents back without the coordinator", func(t *testing.T) {
		restartAgents(t, s, s.Hosts())
		must(t, s.WaitMesh(ctx))
		checkTraffic(t, s)
	})

	t.Run("coordinator back", func(t *testing.T) {
		must(t, s.Coordinator.Restart(ctx))
		checkSeedState(t, s)
		checkTraffic(t, s)
	})

	t.Run("nothing is left of the containers", func(t *testing.T) {
		for _, c := range s.Containers {
			must(t, c.Del(ctx))
			must(t, c.Del(ctx)) // gone is success
		}
		for _, h := range s.Agents {
			checkNothingLeft(t, h)
			for _, half := range []string{lab.Mesos, lab.Docker} {
				checkDrains(t, h, "dcos", half, 125)
			}
		}
	})

	t.Run("stop", func(t *testing.T) {
		for _, h := range s.Hosts() {
			must(t, h.Proc.Stop())
		}
		must(t, s.Coordinator.Stop())
	})
}

// restartAgents starts agents that were killed and waits until each has set up
// its host again.
func restartAgents(t *testing.T, s *lab.Seed, hosts []*lab.Host) {
	t.Helper()
	for _, h := range hosts {
		must(t, s.StartAgent(h))
	}
	for _, h := range hosts {
		must(t, h.WaitReady(t.Context()))
	}
}

// TestNoLoss: existing containers notice nothing of agents that die and start.
func TestNoLoss(t *testing.T) {
	s := upSeed(t, seedConfig(t))
	for _, overlay := range lab.SeedOverlays {
		t.Run(overlay, func(t *testing.T) {
			a := place(t, s, 0, overlay+"-a", overlay, lab.Mesos)
			b := place(t, s, 1, overlay+"-b", overlay, lab.Docker)
			waitPing(t, a.Netns, b.Addr(), 5*time.Second)

			const count = 600
			cmd := a.Command(t.Context(), "ping", "-n", "-q", "-i", "0.01", "-c", strconv.Itoa(count), "-W", "2", b.Addr().String())
			type result struct {
				out []byte
				err error
			}
			done := make(chan result, 1)
			go func() {
				out, err := cmd.CombinedOutput()
				done <- result{out, err}
			}()
			restarts := 0
			for {
				for _, h := range s.Agents {
					h.Proc.Kill()
				}
				select {
				case r := <-done:
					// The last round killed the agents; have them back for the next test.
					restartAgents(t, s, s.Agents)
					sent, received, err := lab.PingCounts(string(r.out))
					if err != nil || r.err != nil {
						t.Fatalf("%v, %v: %s", err, r.err, r.out)
					}
					if sent != count || received != sent {
						t.Errorf("%d sent, %d answered while both agents were killed and started %d times", sent, received, restarts)
					}
					if restarts == 0 {
						t.Error("no agent was restarted while the pings ran")
					}
					t.Logf("%d of %d answered, %d restarts of both agents", received, sent, restarts)
					return
				default:
				}
				restartAgents(t, s, s.Agents)
				restarts++
			}
		})
	}
}

// TestReboot: a host that lost its links, its namespaces and its run directory
// comes back as it was, without the coordinator.
func TestReboot(t *testing.T) {
	s := upSeed(t, seedConfig(t))
	ctx := t.Context()
	h := s.Agents[0]
	b := place(t, s, 1, "b", "dcos", lab.Docker)
	storesPeers(t, h, s.Master, s.Agents[1])
	s.Coordinator.Kill()
	reboot(t, h)

	restartAgents(t, s, []*lab.Host{h})
	must(t, s.WaitMesh(ctx))
	for _, half := range []string{lab.Mesos, lab.Docker} {
		c := place(t, s, 0, half, "dcos", half)
		waitPing(t, c.Netns, b.Addr(), 60*time.Second)
		waitPing(t, b.Netns, c.Addr(), 60*time.Second)
	}
	checkTraffic(t, s)
}

// storesPeers waits until a host has stored its peers.
func storesPeers(t *testing.T, h *lab.Host, peers ...*lab.Host) {
	t.Helper()
	wait(t, "the peers to be stored", 60*time.Second, func() error {
		b, err := os.ReadFile(filepath.Join(h.StateDir, "peers.json"))
		if err != nil {
			return err
		}
		for _, peer := range peers {
			if !strings.Contains(string(b), `"`+peer.Underlay().String()+`"`) {
				return fmt.Errorf("%s is not among them", peer.Underlay())
			}
		}
		return nil
	})
}

// reboot takes from a host what a reboot does; its agent is to be started again.
func reboot(t *testing.T, h *lab.Host) {
	t.Helper()
	ctx := t.Context()
	h.Proc.Kill()
	links, err := exec.CommandContext(ctx, "ip", "-n", h.Netns.Name, "-o", "link").Output()
	must(t, err)
	for _, m := range regexp.MustCompile(`(?m)^\d+: ((?:[md]-|vtep)[^:@]+)`).FindAllSubmatch(links, -1) {
		must(t, h.Configure(ctx, "link delete "+string(m[1])))
	}
	for _, ipt := range []string{"iptables", "ip6tables"} {
		for _, table := range []string{"filter", "nat"} {
			_, err := h.Run(ctx, ipt, "-w", "-t", table, "-F")
			must(t, err)
		}
	}
	must(t, os.RemoveAll(h.RunDir))
	must(t, os.MkdirAll(h.RunDir, 0o755))
}

// TestAddressChanged: a host whose address is replaced by another keeps its
// lease, and the others send to the new one. The coordinator cannot know that
// it is the same host before the connection from the old address is dead.
func TestAddressChanged(t *testing.T) {
	t.Parallel()
	s := newSeed(t, seedConfig(t))
	ctx := t.Context()
	h := s.Agents[0]
	h.FindsIP = true
	must(t, s.Up(ctx))
	a := place(t, s, 0, "a", "dcos", lab.Mesos)
	b := place(t, s, 1, "b", "dcos", lab.Docker)
	waitPing(t, b.Netns, a.Addr(), 5*time.Second)

	was := h.IP
	h.IP = netip.MustParseAddr("172.17.0.44")
	must(t, h.Configure(ctx, "address delete "+was.String()+"/16 dev eth0", "address add "+h.IP.String()+"/16 dev eth0"))
	wait(t, "the coordinator to show the new address", time.Minute, func() error {
		state, err := s.Coordinator.State(ctx)
		if err != nil {
			return err
		}
		for _, agent := range state.Agents {
			if agent.IP == h.IP {
				return nil
			}
		}
		return fmt.Errorf("%s is not among them", h.IP)
	})
	waitPing(t, b.Netns, a.Addr(), 5*time.Second)
	checkTraffic(t, s)
}
