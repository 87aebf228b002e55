package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// datapathOf is what the agent of a host publishes about the way of traffic.
func datapathOf(h *lab.Host) (mode, taken, reason string, err error) {
	var s struct {
		Datapath struct{ Mode, Taken, Reason string }
	}
	b, err := os.ReadFile(filepath.Join(h.RunDir, "state.json"))
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	return s.Datapath.Mode, s.Datapath.Taken, s.Datapath.Reason, err
}

// waitDatapath waits until traffic of a host takes that way.
func waitDatapath(t *testing.T, h *lab.Host, want, why string) {
	t.Helper()
	must(t, lab.Wait(t.Context(), "the datapath "+want, 45*time.Second, func() error {
		mode, taken, reason, err := datapathOf(h)
		if err == nil && (taken != want || !strings.Contains(reason, why)) {
			err = fmt.Errorf("%s takes %s (%s): %q", h.Name, taken, mode, reason)
		}
		return err
	}))
}

// fastPackets are those that a host's fast path took, in both directions.
func fastPackets(t *testing.T, h *lab.Host) (sum float64) {
	t.Helper()
	b, err := h.Get(t.Context(), "/metrics")
	must(t, err)
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "overlay_agent_traffic_packets_total{") && strings.Contains(line, `path="fast"`) {
			f := strings.Fields(line)
			n, err := strconv.ParseFloat(f[len(f)-1], 64)
			must(t, err)
			sum += n
		}
	}
	return sum
}

// TestFastPath: on hosts that suit it, what containers of two hosts say to each
// other takes the fast path by itself, without the agent too; a host without it
// and one with it talk; a rule of the host sends everything back to the kernel.
func TestFastPath(t *testing.T) {
	t.Parallel()
	s := upSeed(t, seedConfig(t))
	here, there := s.Agents[0], s.Agents[1]
	for _, h := range s.Agents {
		waitDatapath(t, h, "ebpf", "")
	}
	for _, overlay := range []string{"dcos", "dcos6"} {
		for _, half := range []string{lab.Mesos, lab.Docker} {
			t.Run(overlay+"/"+half, func(t *testing.T) {
				a := place(t, s, 0, "fast-"+overlay+half, overlay, half)
				b := place(t, s, 1, "fast-"+overlay+half, overlay, half)
				must(t, lab.Wait(t.Context(), "the fast path", 10*time.Second, func() error {
					before := [2]float64{fastPackets(t, here), fastPackets(t, there)}
					_, err := a.Run(t.Context(), "ping", "-c", "3", "-i", "0.05", "-W", "1", b.Addr().String())
					if n, m := fastPackets(t, here)-before[0], fastPackets(t, there)-before[1]; n != 6 || m != 6 {
						err = errors.Join(err, fmt.Errorf("%v and %v packets of 3 pings took it, want 6 and 6", n, m))
					}
					return err
				}))
			})
		}
	}
	a, b := s.Containers[0], s.Containers[1]
	ping := func(what string) {
		t.Helper()
		if out, err := a.Run(t.Context(), "ping", "-c", "20", "-i", "0.02", "-W", "1", b.Addr().String()); err != nil || !strings.Contains(out, " 0% packet loss") {
			t.Errorf("%s: %v: %s", what, err, out)
		}
	}
	t.Run("without the agent", func(t *testing.T) {
		here.Proc.Kill()
		before, _ := vtepCounters(t, here)
		ping("killed")
		if after, _ := vtepCounters(t, here); after.Packets-before.Packets > 5 {
			t.Errorf("%v packets went by vtep1024", after.Packets-before.Packets)
		}
		must(t, s.StartAgent(here))
		must(t, here.WaitReady(t.Context()))
		ping("started again")
	})
	t.Run("one host without it", func(t *testing.T) {
		there.Proc.Kill()
		there.Datapath = "kernel"
		must(t, s.StartAgent(there))
		must(t, there.WaitReady(t.Context()))
		waitDatapath(t, there, "kernel", "")
		before, _ := vtepCounters(t, there)
		ping("mixed")
		if after, _ := vtepCounters(t, there); after.Packets-before.Packets < 20 {
			t.Errorf("%v packets went by the kernel of the host without it, want 20", after.Packets-before.Packets)
		}
	})
	t.Run("a rule of the host", func(t *testing.T) {
		waitDatapath(t, here, "ebpf", "")
		_, err := here.Run(t.Context(), "iptables", "-t", "mangle", "-A", "FORWARD", "-p", "tcp", "--dport", "22", "-j", "DROP")
		must(t, err)
		waitDatapath(t, here, "kernel", "--dport 22")
		ping("by the kernel")
	})
}
