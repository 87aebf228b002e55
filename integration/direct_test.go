package integration

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// sendsDirect waits until the routes of a host lead to so many others without
// VXLAN.
func sendsDirect(t *testing.T, h *lab.Host, want int) {
	t.Helper()
	must(t, lab.Wait(t.Context(), "routes without VXLAN", 30*time.Second, func() error {
		out, err := h.Run(t.Context(), "sh", "-c", "ip route show proto 44 | grep -c ' src '")
		if exit := new(exec.ExitError); errors.As(err, &exit) && exit.ExitCode() == 1 {
			err = nil // none
		}
		if n := lineNumber(out); err == nil && n != want {
			err = fmt.Errorf("%s has %d, want %d", h.Name, n, want)
		}
		return err
	}))
}

func lineNumber(s string) (n int) {
	fmt.Sscan(s, &n)
	return n
}

// TestDirectRouting: on a cluster that sends without VXLAN everything talks as
// with it, past vtep1024 where overlay and underlay are of one family. Hosts
// change between both under traffic, one at a time, and nothing is lost.
func TestDirectRouting(t *testing.T) {
	t.Parallel()
	s := newSeed(t, seedConfig(t))
	for _, h := range s.Agents {
		h.Routing, h.Datapath = "direct", "kernel"
	}
	must(t, s.Up(t.Context()))
	must(t, s.PlaceAll(t.Context()))
	// One subnet and the VTEP address of the one other host, in IPv4.
	for _, h := range s.Agents {
		sendsDirect(t, h, 2)
	}
	t.Run("traffic", func(t *testing.T) { checkTraffic(t, s) })

	a, b := place(t, s, 0, "direct-a", "dcos", lab.Mesos), place(t, s, 1, "direct-b", "dcos", lab.Docker)
	waitPing(t, a.Netns, b.Addr(), 5*time.Second)
	before, _ := vtepCounters(t, s.Agents[0])
	if _, err := a.Run(t.Context(), "ping", "-n", "-q", "-i", "0.01", "-c", "100", b.Addr().String()); err != nil {
		t.Error(err)
	}
	if after, _ := vtepCounters(t, s.Agents[0]); after.Packets-before.Packets > 20 {
		t.Errorf("%v packets went by vtep1024", after.Packets-before.Packets)
	}

	t.Run("a network that checks sources", func(t *testing.T) {
		may := []string{"portmap"} // which the lab has not
		wantFindings(t, s.Agents[0], may)
		script(t, s.Agents[1], `nft 'add table netdev cloud; add chain netdev cloud in { type filter hook ingress device eth0 priority 0; }; add rule netdev cloud in ip saddr 9.0.0.0/8 drop'`)
		found := wantFindings(t, s.Agents[0], may, "direct")
		script(t, s.Agents[1], "nft delete table netdev cloud")
		for _, f := range found {
			if f.Check == "direct" && !strings.Contains(f.What, s.Agents[1].Underlay().String()) {
				t.Errorf("the finding does not name the host: %+v", f)
			}
		}
		wantFindings(t, s.Agents[0], may)
		out, err := s.Agents[0].Run(t.Context(), filepath.Join(binDir, "overlayctl"), "explain", a.Addr().String(), b.Addr().String(), "--run-dir", s.Agents[0].RunDir)
		if err != nil || !strings.Contains(out, "without VXLAN") {
			t.Errorf("explain: %v\n%s", err, out)
		}
	})

	t.Run("switched", func(t *testing.T) {
		const count = 3000
		cmd := a.Command(t.Context(), "ping", "-n", "-q", "-i", "0.005", "-c", strconv.Itoa(count), "-W", "2", b.Addr().String())
		done := make(chan []byte, 1)
		go func() {
			out, _ := cmd.CombinedOutput()
			done <- out
		}()
		change := func(n int, routing string) {
			s.Agents[n].Proc.Kill()
			s.Agents[n].Routing = routing
			must(t, s.StartAgent(s.Agents[n]))
			must(t, s.Agents[n].WaitReady(t.Context()))
		}
		changes := 0
		for _, c := range []struct {
			host    int
			routing string
			direct  [2]int
		}{
			{0, "vxlan", [2]int{0, 0}}, {1, "vxlan", [2]int{0, 0}}, {1, "direct", [2]int{0, 0}}, {0, "direct", [2]int{2, 2}},
			{1, "vxlan", [2]int{0, 0}}, {1, "direct", [2]int{2, 2}},
		} {
			change(c.host, c.routing)
			for i, n := range c.direct {
				sendsDirect(t, s.Agents[i], n)
			}
			if len(done) == 0 {
				changes++
			}
		}
		out := <-done
		sent, received, err := lab.PingCounts(string(out))
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if sent != count || received != sent {
			t.Errorf("%d sent, %d answered while routing was changed %d times", sent, received, changes)
		}
		if changes < 4 { // each host to each way
			t.Errorf("only %d changes were made while the pings ran", changes)
		}
		t.Logf("%d of %d answered, %d changes", received, sent, changes)
	})
	t.Run("on the fast path", func(t *testing.T) {
		for _, h := range s.Agents {
			h.Proc.Kill()
			h.Datapath = "ebpf"
			must(t, s.StartAgent(h))
			must(t, h.WaitReady(t.Context()))
		}
		for _, h := range s.Agents {
			waitDatapath(t, h, "ebpf", "")
			sendsDirect(t, h, 2)
		}
		must(t, lab.Wait(t.Context(), "the fast path", 10*time.Second, func() error {
			before := fastPackets(t, s.Agents[0])
			if _, err := a.Run(t.Context(), "ping", "-n", "-c", "10", "-i", "0.02", "-W", "1", b.Addr().String()); err != nil {
				return err
			}
			if n := fastPackets(t, s.Agents[0]) - before; n != 20 {
				return fmt.Errorf("%v packets of 10 pings took it", n)
			}
			return nil
		}))
	})
	t.Run("traffic afterwards", func(t *testing.T) { checkTraffic(t, s) })
}
