package firewalld

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
	before := l.cmd("--list-all-zones")
	check := func(when string) {
		t.Helper()
		if n, err := l.ensure("vtep1024", "d-dcos"); n == 0 || err != nil {
			t.Errorf("%s: %d changes, %v", when, n, err)
		}
		if n, err := l.ensure("vtep1024", "d-dcos"); n != 0 || err != nil {
			t.Errorf("%s, again: %d changes, %v", when, n, err)
		}
		if got := l.cmd("--zone=overlay --list-all"); !strings.Contains(got, "target: ACCEPT") || !strings.Contains(got, "vtep1024") || !strings.Contains(got, "d-dcos") {
			t.Errorf("%s: zone overlay is\n%s", when, got)
		}
		if got := l.cmd("--zone=public --query-port=64000/udp"); got != "yes" {
			t.Errorf("%s: the VXLAN port is not open: %s", when, got)
		}
	}
	check("at first")
	l.sources = []netip.Prefix{netip.MustParsePrefix("9.0.0.0/8"), netip.MustParsePrefix("fd01:b::/64")}
	check("without VXLAN")
	if got := l.cmd("--zone=overlay --list-sources"); got != "9.0.0.0/8 fd01:b::/64" {
		t.Errorf("sources are %q", got)
	}
	l.cmd("--reload")
	check("after a reload")
	stop()
	l.startFirewalld()
	check("after a restart")
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
	_ = l.ns.Do(func(ns.NetNS) error {
		if n, err := (Client{l.address}).Remove(t.Context(), "eth0"); n != 1 || err != nil {
			t.Errorf("Remove: %d, %v", n, err)
		}
		return nil
	})
	if got := l.cmd("--list-all-zones"); got != before {
		t.Errorf("Remove left\n%s\nbefore:\n%s", got, before)
	}
	// The firewalld of another namespace is none of ours.
	if n, err := (Client{l.address}).Ensure(t.Context(), Traffic{Devices: []string{"vtep1024"}, Underlay: "eth0"}); n != 0 || err != nil {
		t.Errorf("from another namespace: %d, %v", n, err)
	}
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
