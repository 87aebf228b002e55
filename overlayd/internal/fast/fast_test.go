package fast

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/fastpath"
	"overlayd.internal/overlay/overlayd/internal/datapath"
)

// onOwnHost runs the calling test again in a process with a network namespace of
// its own, in which the goroutines of a path are on any thread, and reports
// whether this is that process.
func onOwnHost(t *testing.T) bool {
	t.Helper()
	const env = "OVERLAY_TEST_HOST"
	if os.Getenv(env) == t.Name() {
		sh(t, "ip link set lo up")
		sh(t, "ip link add eth0 type veth peer name lan")
		sh(t, "ip link set lan up")
		sh(t, "ip link set eth0 up")
		sh(t, "ip address add 172.30.0.1/24 dev eth0")
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), env+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("on a host of its own: %v\n%s", err, out)
	}
	return false
}

func sh(t *testing.T, line string) string {
	t.Helper()
	argv := strings.Fields(line)
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	return string(out)
}

var wanted = fastpath.Wanted{
	Local: netip.MustParseAddr("172.30.0.1"), VTEPMAC: conf.MAC{2, 0, 0, 0, 0, 1},
	Overlays: []fastpath.Overlay{{Name: "net", Subnets: []netip.Prefix{netip.MustParsePrefix("9.0.0.0/8")}}},
	Peers: []conf.Peer{{AgentID: "other", AgentIP: netip.MustParseAddr("172.30.0.2"), VTEPMAC: conf.MAC{2, 0, 0, 0, 0, 2},
		Subnets: []netip.Prefix{netip.MustParsePrefix("9.0.2.0/24")}}},
}

// start runs a path until the test, or what it returns, ends it.
func start(t *testing.T, mode Mode) (*Path, func()) {
	t.Helper()
	var log bytes.Buffer
	p := New(mode, slog.New(slog.NewTextHandler(&log, nil)))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return p, stop
}

// becomes waits until the path is what it should be.
func becomes(t *testing.T, p *Path, taken Mode, reason string, filters int) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		s := p.State()
		n := strings.Count(sh(t, "tc filter show dev eth0 ingress"), "overlay_enter_host direct-action")
		if s.Taken == string(taken) && strings.Contains(s.Reason, reason) && n == filters {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("state %+v with %d filters; want %s, %q, %d", s, n, taken, reason, filters)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// A look at the host waits for peers that are still to come, but not for ever.
func TestLookWaitsForPeers(t *testing.T) {
	kicked := func(p *Path) bool {
		select {
		case <-p.kick:
			return true
		default:
			return false
		}
	}
	follow := func(p *Path, partial bool) {
		t.Helper()
		if err := p.Follow(t.Context(), datapath.Wanted{Host: datapath.Host{Partial: partial}}, datapath.Report{}); err != nil {
			t.Fatal(err)
		}
	}
	p := New(Auto, slog.New(slog.DiscardHandler))
	p.patience = time.Hour
	follow(p, true)
	follow(p, true)
	if kicked(p) {
		t.Error("looked at before the peers have come")
	}
	follow(p, false)
	if !kicked(p) {
		t.Error("not looked at when the peers have come")
	}
	p = New(Auto, slog.New(slog.DiscardHandler))
	p.patience = time.Millisecond
	for range 2 {
		follow(p, true)
		select {
		case <-p.kick:
		case <-time.After(20 * time.Second):
			t.Fatal("never looked at, as the peers do not come")
		}
	}
}

// auto follows what happens on the host, while it runs and over restarts.
func TestAuto(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	p, stop := start(t, Auto)
	becomes(t, p, Kernel, "not looked at yet", 0)
	apply := func(p *Path) {
		t.Helper()
		if err := p.Apply(t.Context(), wanted, true); err != nil {
			t.Fatal(err)
		}
	}
	apply(p)
	becomes(t, p, EBPF, "", 1)
	if err := p.Update(nil, []string{"other"}); err != nil {
		t.Fatal(err)
	}
	if traffic, err := p.Traffic(); err != nil || !maps.Equal(traffic, map[string]fastpath.Traffic{"net": {}}) {
		t.Errorf("traffic %v, %v", traffic, err)
	}

	sh(t, "iptables -I FORWARD -p tcp --dport 22 -j DROP")
	apply(p)
	becomes(t, p, Kernel, "--dport 22", 0)
	sh(t, "iptables -F FORWARD")
	apply(p)
	becomes(t, p, EBPF, "", 1)

	stop()
	if n := strings.Count(sh(t, "tc filter show dev eth0 ingress"), "overlay_enter_host direct-action"); n != 1 {
		t.Errorf("%d filters without the process, want it to go on", n)
	}
	sh(t, "iptables -I FORWARD -p tcp --dport 22 -j DROP")
	p, stop = start(t, EBPF)
	apply(p)
	becomes(t, p, EBPF, "", 1)
	stop()
	p, _ = start(t, Kernel)
	becomes(t, p, Kernel, "", 0)
}

// Rules that others change are looked at soon, however often they are changed.
func TestRulesChanged(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	p, _ := start(t, Auto)
	if err := p.Apply(t.Context(), wanted, true); err != nil {
		t.Fatal(err)
	}
	becomes(t, p, EBPF, "", 1)
	sh(t, "iptables -I FORWARD -p tcp --dport 22 -j DROP")
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
				p.RulesChanged()
			}
		}
	}()
	becomes(t, p, Kernel, "--dport 22", 0)
	close(stop)
	<-done
}

// What could be attached in part only is detached, every time.
func TestTakenInPart(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	p, _ := start(t, EBPF)
	many := wanted
	many.Overlays = nil
	for i := range 1025 {
		many.Overlays = append(many.Overlays, fastpath.Overlay{Name: fmt.Sprint("net", i)})
	}
	for range 2 {
		if err := p.Apply(t.Context(), many, true); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * fastLook) // for the look that this asks for
		becomes(t, p, Kernel, "places for", 0)
	}
}
