package repair

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// event is something that a program of Debian does to a host.
type event struct {
	name  string
	run   func(*site)
	named string // what the status says of it, where the program's rules stop the overlays
}

// result is what came of it.
type result struct {
	Event, Firewall string
	Outage          time.Duration // the longest without an answer
	Lost            [3]int
	Named           string
}

// trial is a program beside an agent with a firewall.
type trial struct {
	program, firewall string
	events            func(*site) []event
	times             int
}

func (x trial) name() string { return x.program + ", " + x.firewall }

func trials() (out []trial) {
	for _, p := range []trial{
		{program: "nftables.service", events: nftables, times: 1}, {program: "ufw", events: ufw, times: 1}, {program: "firewalld", events: firewalld, times: *times},
		{program: "systemd-networkd", events: networkd, times: 1}, {program: "NetworkManager", events: networkManager, times: 1},
	} {
		for _, firewall := range firewalls[:2] {
			p.firewall = firewall
			out = append(out, p)
		}
	}
	return out
}

// testPrograms has real firewalls and network managers work on a host while
// containers talk.
func testPrograms(t *testing.T, r *record) {
	for _, p := range trials() {
		for len(r.Programs[p.name()]) < p.times && !r.over() {
			ok := t.Run(p.name(), func(t *testing.T) {
				round := p.undergoAll(t)
				r.Programs[p.name()] = append(r.Programs[p.name()], round)
				r.keep(t)
			})
			if !ok || len(r.Programs[p.name()]) == 0 { // failed or skipped
				break
			}
		}
	}
}

// undergoAll has the program do everything once, on a site of its own.
func (p trial) undergoAll(t *testing.T) (round []result) {
	bus, err := os.MkdirTemp("", "ovr") // a socket's path has few characters, and not every one
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(bus) })
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+filepath.Join(bus, "bus"))
	x := newSite(t, p.firewall)
	cut := false
	for _, e := range p.events(x) {
		r := x.undergo(e, cut)
		cut = e.named != ""
		r.Firewall = p.firewall
		t.Logf("%s: without an answer for %v, lost %v", e.name, r.Outage, r.Lost)
		round = append(round, r)
	}
	return round
}

// undergo runs an event under traffic and waits until all talk, or the status says
// what stops them. cut: something stops them already.
func (x *site) undergo(e event, cut bool) result {
	t := x.t
	t.Helper()
	streams := x.streams()
	flow := func() error {
		for i, s := range streams {
			if !s.flows(30) {
				return fmt.Errorf("stream %d to %s does not flow", i, s.to)
			}
		}
		return nil
	}
	if !cut {
		x.wait("all to talk", 10*time.Second, flow)
	}
	e.run(x)
	r := result{Event: e.name, Named: e.named}
	if e.named != "" {
		x.wait(e.name+" to be named", silent, func() error { return x.says(e.named) })
	} else {
		x.wait("all to talk after "+e.name, silent, flow)
		x.wait("the status to be well after "+e.name, 2*silent, x.well)
		x.wait("all to talk", silent, flow)
	}
	for i, s := range streams {
		r.Outage = max(r.Outage, s.outage())
		_, r.Lost[i] = s.finish()
	}
	return r
}

// private runs a script on the host with copies of directories in the place of
// those of the machine, which stay as they are.
func (x *site) private(dirs []string, script string) string {
	x.t.Helper()
	return x.sh(x.privately(dirs, script))
}

func (x *site) privately(dirs []string, script string) string {
	x.t.Helper()
	var b strings.Builder
	for _, d := range dirs {
		private := filepath.Join(x.h.Dir, "private", d)
		if _, err := os.Stat(private); err != nil {
			must(x.t, os.MkdirAll(filepath.Dir(private), 0o755))
			if out, err := exec.Command("cp", "-a", d, private).CombinedOutput(); err != nil {
				must(x.t, os.MkdirAll(private, 0o755))
				x.t.Logf("%s is empty: %s", d, out)
			}
		}
		fmt.Fprintf(&b, "mount --bind %s %s\n", private, d)
	}
	file := filepath.Join(x.h.Dir, fmt.Sprintf("private-%d.sh", time.Now().UnixNano()))
	must(x.t, os.WriteFile(file, []byte("set -e\n"+b.String()+script+"\n"), 0o755))
	return "unshare --mount --propagation private sh " + file
}

// ufw with SSH and ICMP let in, as one has it on a server.
func ufw(x *site) []event {
	dirs := []string{"/etc/ufw", "/etc/default"}
	do := func(command string) func(*site) {
		return func(x *site) { x.private(dirs, command) }
	}
	var named string
	if os.Getenv("OVERLAYD_FIREWALL") == "nftables" {
		named = "see: iptables-nft --list-rules FORWARD"
	}
	return []event{
		{"ufw allow OpenSSH && ufw enable", do("ufw allow 22/tcp; ufw --force enable"), named},
		{"ufw reload", do("ufw reload"), named},
		{"ufw disable", do("ufw --force disable; iptables -w -P FORWARD ACCEPT"), ""},
	}
}

// nftables loads the file that Debian's package has, as its unit does.
func nftables(*site) []event {
	return []event{{"systemctl reload nftables", func(x *site) {
		file := filepath.Join(x.h.Dir, "nftables.conf")
		must(x.t, os.WriteFile(file, []byte(`flush ruleset
table inet filter {
	chain input { type filter hook input priority filter; }
	chain forward { type filter hook forward priority filter; }
	chain output { type filter hook output priority filter; }
}
`), 0o644))
		x.sh("nft -f " + file)
	}, ""}}
}

const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>%s</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/></policy></busconfig>`

// bus starts a system bus of the host.
func (x *site) bus() {
	x.t.Helper()
	address := os.Getenv("DBUS_SYSTEM_BUS_ADDRESS")
	file := filepath.Join(x.h.Dir, "bus.conf")
	must(x.t, os.WriteFile(file, fmt.Appendf(nil, busConfig, address), 0o644))
	_, err := x.Start(x.h.Netns, "dbus", "dbus-daemon", "--nofork", "--nopidfile", "--config-file="+file)
	must(x.t, err)
	x.wait("the bus", 10*time.Second, func() error {
		_, err := os.Stat(strings.TrimPrefix(address, "unix:path="))
		return err
	})
}

// firewalld with its default zone, public.
func firewalld(x *site) []event {
	x.bus()
	var running *lab.Proc
	start := func(x *site) {
		var err error
		running, err = x.Start(x.h.Netns, "firewalld", "firewalld", "--nofork", "--nopid",
			"--system-config="+filepath.Join(x.h.Dir, "firewalld"), "--log-file="+filepath.Join(x.h.Dir, "firewalld.log"))
		must(x.t, err)
		x.wait("firewalld", 30*time.Second, func() error {
			_, err := x.try("firewall-cmd --state")
			return err
		})
	}
	return []event{
		{"firewalld starts", start, ""},
		{"firewall-cmd --reload", func(x *site) { x.sh("firewall-cmd --reload") }, ""},
		{"firewall-cmd --complete-reload", func(x *site) { x.sh("firewall-cmd --complete-reload") }, ""},
		{"firewalld ends", func(x *site) { running.Kill(); x.sh("nft delete table inet firewalld 2>/dev/null || true") }, ""},
	}
}

// networkd with a file for every device, which takes veths out of their bridges.
func networkd(x *site) []event {
	var running *lab.Proc
	start := func(x *site) {
		script := `mount -t tmpfs run /run/systemd; mkdir -p /run/systemd/network /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp
unset DBUS_SYSTEM_BUS_ADDRESS
chown -R systemd-network:systemd-network /run/systemd/netif
printf '[Match]\nName=*\n[Network]\nLinkLocalAddressing=ipv6\n' >/run/systemd/network/zz-all.network
mount -t sysfs -o ro sys /sys
exec /lib/systemd/systemd-networkd`
		var err error
		running, err = x.Start(x.h.Netns, "networkd", "sh", "-ec", x.privately(nil, script))
		must(x.t, err)
		x.wait("systemd-networkd to take the container's port out of its bridge", 20*time.Second, func() error {
			if running.Fate() != "running" {
				return errors.New("it ended: " + running.Fate())
			}
			return running.LogContains("Gained carrier")
		})
	}
	return []event{
		{"systemd-networkd with [Match] Name=* starts", start, ""},
		{"systemd-networkd starts again", func(x *site) { running.Kill(); must(x.t, os.Truncate(running.Log, 0)); start(x) }, ""},
	}
}

// dropIn is what doctor has one write for NetworkManager.
const dropIn = "[keyfile]\nunmanaged-devices+=interface-name:vtep1024*;interface-name:m-*;interface-name:d-*;interface-name:vm????????????;interface-name:vd????????????\n"

// networkManager with its defaults, where every device is one of its own (udev,
// which would tell it to leave veths alone, is not there), and told to leave ours
// alone.
func networkManager(x *site) []event {
	program, err := exec.LookPath("NetworkManager")
	if err != nil {
		x.t.Skip("NetworkManager is not installed (package network-manager)")
	}
	x.bus()
	pidFile := filepath.Join(x.h.Dir, "NetworkManager.pid")
	var running *lab.Proc
	start := func(x *site) {
		script := "echo $$ >" + pidFile + "\n" + `mount -t tmpfs run /run/NetworkManager 2>/dev/null || { mkdir -p /run/NetworkManager; mount -t tmpfs run /run/NetworkManager; }
mount -t tmpfs lib /var/lib/NetworkManager
mount -t sysfs -o ro sys /sys
exec ` + program + ` --debug --log-level=INFO`
		running, err = x.Start(x.h.Netns, "NetworkManager", "sh", "-ec", x.privately([]string{"/etc/NetworkManager"}, script))
		must(x.t, err)
		x.wait("NetworkManager", 30*time.Second, func() error {
			if running.Fate() != "running" {
				return errors.New("it ended: " + running.Fate())
			}
			return running.LogContains("startup complete")
		})
		x.t.Logf("NetworkManager has:\n%s", x.sh("nmcli -t -f DEVICE,TYPE,STATE,CONNECTION device"))
	}
	again := func(x *site) {
		x.sh("kill $(cat " + pidFile + ")")
		x.wait("NetworkManager to end", 20*time.Second, func() error {
			if running.Fate() == "running" {
				return errors.New("it runs")
			}
			return nil
		})
		must(x.t, os.Truncate(running.Log, 0))
		start(x)
	}
	told := func(x *site) {
		file := filepath.Join(x.h.Dir, "private/etc/NetworkManager/conf.d/90-overlay.conf")
		must(x.t, os.WriteFile(file, []byte(dropIn), 0o644))
		again(x)
		for line := range strings.Lines(x.sh("nmcli -t -f DEVICE,STATE device")) {
			device, state, _ := strings.Cut(strings.TrimSpace(line), ":")
			if ours := regexp.MustCompile(`^(vtep1024|[md]-|v[md])`); ours.MatchString(device) && state != "unmanaged" {
				x.t.Errorf("%s is %s", device, state)
			}
		}
	}
	return []event{
		{"NetworkManager starts", start, ""},
		{"NetworkManager starts again", again, ""},
		{"NetworkManager starts, told to leave the devices alone", told, ""},
	}
}

// outage is the longest time without an answer.
func (s *stream) outage() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	longest, run := 0, 0
	for i, ok := range slices.Clone(s.answered) {
		if ok || time.Since(s.sent[i]) < patience {
			run = 0
			continue
		}
		run++
		longest = max(longest, run)
	}
	return time.Duration(longest) * pingPause
}
