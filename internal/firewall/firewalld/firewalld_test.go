package firewalld

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
)

// busConfig lets everybody own and call everything.
const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=%s</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/>%s</policy></busconfig>`

// lab is a network namespace with a system bus and Debian's firewalld in it.
type lab struct {
	t       *testing.T
	ns      ns.NetNS
	dir     string
	address string
	sources []netip.Prefix // that come in without VXLAN
}

func newLab(t *testing.T, policy string) *lab {
	t.Helper()
	name := fmt.Sprintf("ovd-%d-%s", os.Getpid(), strings.ToLower(t.Name()))
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		t.Fatalf("make a network namespace (as root): %v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	n, err := ns.GetNS("/run/netns/" + name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	// A socket's path may not be long.
	dir, err := os.MkdirTemp("", "ovd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := &lab{t: t, ns: n, dir: dir, address: "unix:path=" + filepath.Join(dir, "bus")}
	file := filepath.Join(dir, "bus.conf")
	if err := os.WriteFile(file, fmt.Appendf(nil, busConfig, filepath.Join(dir, "bus"), policy), 0o644); err != nil {
		t.Fatal(err)
	}
	l.start("dbus-daemon", "--nofork", "--nopidfile", "--config-file="+file)
	l.wait("the bus", func() bool { _, err := os.Stat(filepath.Join(dir, "bus")); return err == nil })
	l.sh("ip link set lo up; ip link add vtep1024 type veth peer name d-dcos; ip link add eth0 type veth peer name eth9; ip link set vtep1024 up; ip link set eth0 up")
	return l
}

// start runs a daemon until the test ends.
func (l *lab) start(argv ...string) (stop func()) {
	l.t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+l.address)
	log, err := os.Create(filepath.Join(l.dir, filepath.Base(argv[0])+".log"))
	if err != nil {
		l.t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := l.ns.Do(func(ns.NetNS) error { return cmd.Start() }); err != nil {
		l.t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			cmd.Process.Signal(os.Interrupt)
			done := time.AfterFunc(5*time.Second, func() { cmd.Process.Kill() })
			cmd.Wait()
			done.Stop()
			log.Close()
		}
	}
	l.t.Cleanup(stop)
	return stop
}

func (l *lab) startFirewalld() (stop func()) {
	l.t.Helper()
	stop = l.start("firewalld", "--nofork", "--nopid", "--system-config="+filepath.Join(l.dir, "etc"), "--log-file="+filepath.Join(l.dir, "firewalld"))
	l.wait("firewalld", func() bool { return l.cmd("--state") == "running" })
	return stop
}

func (l *lab) wait(what string, ok func() bool) {
	l.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			out, _ := exec.Command("sh", "-c", "tail -20 "+l.dir+"/*.log "+l.dir+"/firewalld").CombinedOutput()
			l.t.Fatalf("%s does not come\n%s", what, out)
		}
	}
}

func (l *lab) sh(script string) (out string) {
	l.t.Helper()
	cmd := exec.Command("sh", "-c", script)
	cmd.Env = append(os.Environ(), "DBUS_SYSTEM_BUS_ADDRESS="+l.address)
	_ = l.ns.Do(func(ns.NetNS) error {
		b, _ := cmd.CombinedOutput()
		out = strings.TrimSpace(string(b))
		return nil
	})
	return out
}

func (l *lab) cmd(args string) string { l.t.Helper(); return l.sh("firewall-cmd " + args) }

func (l *lab) ensure(devices ...string) (changed int, err error) {
	l.t.Helper()
	_ = l.ns.Do(func(ns.NetNS) error {
		changed, err = Client{l.address}.Ensure(context.Background(), Traffic{Devices: devices, Sources: l.sources, Underlay: "eth0"})
		return nil
	})
	return changed, err
}

// Devices and port are let through, again after a reload and a restart, and
// nothing is left in the end.
func TestFirewalld(t *testing.T) {
	l := newLab(t, "")
	if n, err := l.ensure("vtep1024"); n != 0 || err != nil {
		t.Errorf("without firewalld: %d, %v", n, err)
	}
	stop := l.startFirewalld()
	before := l.cmd("--list-all-zones") + l.cmd("--get-policies")
	check := func(when, zone, port string) {
		t.Helper()
		if _, err := l.ensure("vtep1024", "d-dcos"); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		if n, err := l.ensure("vtep1024", "d-dcos"); n != 0 || err != nil {
			t.Errorf("%s, again: %d changes, %v", when, n, err)
		}
		got := l.cmd("--zone=" + zone + " --list-all")
		for _, want := range append([]string{"target: ACCEPT", "vtep1024", "d-dcos"}, prefixes(l.sources)...) {
			if !strings.Contains(got, want) {
				t.Errorf("%s: zone %s lacks %s:\n%s", when, zone, want, got)
			}
		}
		if got := l.cmd(port); !strings.Contains(got, "64000/udp") {
			t.Errorf("%s: the VXLAN port is not open: %s", when, got)
		}
	}
	l.cmd("--add-service=http") // at run time only, which a reload would undo
	check("at first", "trusted", "--zone=public --list-ports")
	l.sources = []netip.Prefix{netip.MustParsePrefix("9.0.0.0/8"), netip.MustParsePrefix("fd01:b::/64")}
	check("without VXLAN", "trusted", "--zone=public --list-ports")
	if got := l.cmd("--zone=public --query-service=http"); got != "yes" {
		t.Errorf("what was changed at run time is gone: %s", got)
	}
	l.cmd("--reload")
	const policy = "--info-policy=overlay-vxlan"
	check("after a reload", "overlay", policy)
	// What it starts with is the same.
	kept := func(when string) {
		t.Helper()
		if got := l.cmd("--zone=overlay --list-sources"); got != "" {
			t.Errorf("%s: sources are there before anybody asked: %s", when, got)
		}
		if n, err := l.ensure("vtep1024", "d-dcos"); n != len(l.sources) || err != nil {
			t.Errorf("%s: %d changes, %v", when, n, err)
		}
		check(when, "overlay", policy)
	}
	l.cmd("--reload")
	kept("after another reload")
	stop()
	l.startFirewalld()
	kept("after a restart")
	l.sources = nil
	if _, err := l.ensure("vtep1024"); err != nil {
		t.Error(err)
	}
	if got := l.cmd("--zone=overlay --list-sources"); got != "" {
		t.Errorf("sources that are no longer wanted stay: %s", got)
	}
	if got := l.cmd("--zone=overlay --list-interfaces"); got != "vtep1024" {
		t.Errorf("a device that is no longer ours stays: %s", got)
	}
	for _, when := range []string{"at last", "before firewalld reloaded"} {
		_ = l.ns.Do(func(ns.NetNS) error {
			if n, err := (Client{l.address}).Remove(t.Context(), "eth0"); n != 2 || err != nil {
				t.Errorf("%s, Remove: %d, %v", when, n, err)
			}
			return nil
		})
		if got := l.cmd("--list-all-zones") + l.cmd("--get-policies"); got != before {
			t.Errorf("%s, Remove left\n%s\nbefore:\n%s", when, got, before)
		}
		l.sources = []netip.Prefix{netip.MustParsePrefix("9.0.0.0/8")}
		if _, err := l.ensure("vtep1024"); err != nil {
			t.Error(err)
		}
	}
	// The firewalld of another namespace is none of ours.
	if n, err := (Client{l.address}).Ensure(t.Context(), Traffic{Devices: []string{"vtep1024"}, Underlay: "eth0"}); n != 0 || err != nil {
		t.Errorf("from another namespace: %d, %v", n, err)
	}
}

func prefixes(in []netip.Prefix) (out []string) {
	for _, p := range in {
		out = append(out, p.String())
	}
	return out
}

// firewalld is told when it starts, and when somebody takes a device out and
// reloads it, without anybody asking for it.
func TestKeeper(t *testing.T) {
	l := newLab(t, "")
	news := make(chan struct{}, 1)
	k := NewKeeper(l.address, news)
	k.Want(Traffic{Devices: []string{"vtep1024", "d-dcos"}, Underlay: "eth0"}, k.Round())
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = l.ns.Do(func(ns.NetNS) error { return k.Run(ctx) }) })
	defer running.Wait()
	defer cancel()
	l.startFirewalld()
	has := func(zone string) func() bool {
		return func() bool {
			got := strings.Fields(l.cmd("--zone=" + zone + " --list-interfaces"))
			slices.Sort(got)
			return slices.Equal(got, []string{"d-dcos", "vtep1024"})
		}
	}
	l.wait("zone trusted", has("trusted"))
	select {
	case <-news:
	case <-time.After(30 * time.Second):
		t.Fatal("what was changed is not announced")
	}
	l.wait("zone overlay", func() bool { return strings.Contains(l.cmd("--permanent --zone=overlay --list-all"), "target: ACCEPT") })
	l.cmd("--zone=trusted --remove-interface=d-dcos; firewall-cmd --permanent --zone=overlay --remove-interface=d-dcos; firewall-cmd --reload")
	l.wait("zone overlay again", has("overlay"))
	if n, err := k.Want(Traffic{Devices: []string{"vtep1024"}, Underlay: "eth0"}, k.Round()); n < 3 || err != nil {
		t.Errorf("%d changes so far, %v", n, err)
	}
	l.wait("another zone overlay", func() bool { return l.cmd("--zone=overlay --list-interfaces") == "vtep1024" })
}

// Without the right to change it the error says what to type.
func TestFirewalldRefuses(t *testing.T) {
	l := newLab(t, `<deny send_destination="org.fedoraproject.FirewallD1" send_interface="org.fedoraproject.FirewallD1.zone"/>`)
	l.start("firewalld", "--nofork", "--nopid", "--system-config="+filepath.Join(l.dir, "etc"), "--log-file="+filepath.Join(l.dir, "firewalld"))
	var err error
	l.wait("a refusal", func() bool { _, err = l.ensure("vtep1024"); return err != nil })
	for _, want := range []string{"firewalld runs", "type: firewall-cmd --permanent --new-zone=overlay", "--add-interface=vtep1024", "--add-port=64000/udp"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
}
