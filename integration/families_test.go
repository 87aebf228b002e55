package integration

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// twoFamilies are a host with IPv4 alone, one with both families and one with IPv6
// alone, with a container on each and the coordinator on a host of its own.
type twoFamilies struct {
	*lab.Seed
	four, both, six *lab.Host
	on              map[*lab.Host]*lab.Container
}

func newTwoFamilies(t *testing.T) *twoFamilies {
	ctx := t.Context()
	s := newSeed(t, seedConfig(t))
	f := &twoFamilies{Seed: s, four: s.Agents[0], six: s.Agents[1], on: map[*lab.Host]*lab.Container{}}
	var err error
	f.both, err = s.Host(ctx, "both", 5)
	must(t, err)
	f.both.FindsIP = true
	script(t, f.four, "ip -6 address flush dev eth0 scope global")
	must(t, f.six.DropIPv4(ctx))
	must(t, s.StartCoordinator(ctx))
	six := strings.Replace(s.Coordinator.URL, s.Master.IP.String(), "["+s.Master.IP6.String()+"]", 1)
	for h, url := range map[*lab.Host]string{f.four: s.Coordinator.URL, f.both: s.Coordinator.URL, f.six: six} {
		must(t, h.StartAgent(url))
	}
	for _, h := range []*lab.Host{f.four, f.both, f.six} {
		must(t, h.WaitRegistered(ctx, s.Coordinator))
		must(t, h.WaitReady(ctx))
		c, err := h.Attach(ctx, "c", "dcos", lab.Docker)
		must(t, err)
		f.on[h] = c
	}
	return f
}

// talk waits until the containers of two hosts reach each other.
func (f *twoFamilies) talk(t *testing.T, a, b *lab.Host) {
	t.Helper()
	waitPing(t, f.on[a].Netns, f.on[b].Addr(), 60*time.Second)
	waitPing(t, f.on[b].Netns, f.on[a].Addr(), 60*time.Second)
}

// names waits until what a host publishes says that it does not reach an address.
func names(t *testing.T, h *lab.Host, ip netip.Addr) {
	t.Helper()
	wait(t, fmt.Sprintf("%s to name %s", h.Name, ip), 60*time.Second, func() error {
		b, err := os.ReadFile(filepath.Join(h.RunDir, "state.json"))
		if err == nil && !strings.Contains(string(b), fmt.Sprintf("at %s cannot be reached", ip)) {
			err = errors.New("it says nothing of it")
		}
		return err
	})
}

// meanwhile does something while one container pings another a hundred times a
// second, for five seconds at least, and checks that every packet is answered.
func (f *twoFamilies) meanwhile(t *testing.T, a, b *lab.Host, do func()) {
	t.Helper()
	ping := startPing(t, f.on[a], f.on[b])
	answers := func() int { return len(sequence.FindAllString(ping.printed(t), -1)) }
	do()
	want := max(500, answers()+100) // what was lost before an answer is seen
	wait(t, fmt.Sprint(want, " answers"), 60*time.Second, func() error {
		if n := answers(); n < want {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	if answered, lost := ping.stop(t); lost > 0 {
		t.Errorf("from %s to %s: %d answered, %d lost", a.Name, b.Name, answered, lost)
	}
}

// TestTwoFamilies: a host with both families reaches hosts of either, which name each
// other. It loses its IPv6 and gets it back, and starts again without a coordinator,
// while those of IPv4 go on without a loss; teardown leaves nothing.
func TestTwoFamilies(t *testing.T) {
	t.Parallel()
	f := newTwoFamilies(t)
	ctx := t.Context()
	f.talk(t, f.four, f.both)
	f.talk(t, f.both, f.six)
	names(t, f.four, f.six.IP6)
	names(t, f.six, f.four.IP)
	may := []string{"portmap"} // which the lab has not
	wantFindings(t, f.both, may)
	wantFindings(t, f.four, may, "underlay-family")
	out, err := f.both.Run(ctx, filepath.Join(binDir, "overlayctl"), "explain", f.on[f.both].Addr().String(), f.on[f.six].Addr().String(), "--run-dir", f.both.RunDir)
	if err != nil || !strings.Contains(out, "dev vtep1024-2") {
		t.Errorf("explain: %v\n%s", err, out)
	}

	f.meanwhile(t, f.four, f.both, func() {
		script(t, f.both, fmt.Sprintf("ip address delete %s/64 dev eth0", f.both.IP6))
		names(t, f.both, f.six.IP6)
	})
	names(t, f.six, f.both.IP)
	f.meanwhile(t, f.four, f.both, func() {
		script(t, f.both, fmt.Sprintf("ip address add %s/64 dev eth0 nodad", f.both.IP6))
		f.talk(t, f.both, f.six)
	})

	must(t, f.Coordinator.Stop())
	for _, other := range []*lab.Host{f.four, f.six} {
		f.meanwhile(t, other, f.both, func() {
			f.both.Proc.Kill()
			must(t, f.both.StartAgent(f.Coordinator.URL))
			must(t, f.both.WaitReady(ctx))
		})
	}
	f.talk(t, f.both, f.six)

	must(t, f.both.Proc.Stop())
	must(t, f.on[f.both].Del(ctx))
	_, err = f.both.Run(ctx, filepath.Join(binDir, "overlayd"), "agent", "teardown", "--run-dir", f.both.RunDir, "--state-dir", f.both.StateDir,
		"--cni-conf-dir", f.both.CNIConfDir, "--ucr-conf-dir", f.both.UCRConfDir, "--docker-host", "", "--coordinator", f.Coordinator.URL)
	must(t, err)
	out, err = f.both.Run(ctx, "sh", "-c", "ip -br link; ip route show proto 44; ip -6 route show proto 44; nft list tables")
	if err != nil || strings.Contains(out, "vtep") || strings.Contains(out, "dcos") || strings.Contains(out, "via") || strings.Contains(out, "overlay") {
		t.Errorf("what is left: %v\n%s", err, out)
	}
}
