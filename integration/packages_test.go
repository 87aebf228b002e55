package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// A purge takes what is the package's own, and nothing that the other daemon of the
// host has in the same directory, or one that runs. `make packages` has it on a Debian.
func TestPurge(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts file systems")
	}
	const (
		agent = `cd /var/lib/overlay; touch agent-id agent.lock instance lease.json pki/identity.pem pki/ca.pem; cd /
touch /run/overlay/state.json /run/overlay/agent.lock /etc/overlay/agent.yaml
printf '#!/bin/sh\necho "$@" >>/run/called\n' >/var/lib/overlay/overlayd.teardown; chmod +x /var/lib/overlay/overlayd.teardown
`
		coordinator = "cd /var/lib/overlay; touch cluster.json coordinator.sock pki/cluster.key pki/roots.json; cd /; touch /etc/overlay/overlay.yaml\n"
		file        = "/var/lib/overlay/coordinator.db"
		agents      = "/etc/overlay/agent.yaml /run/overlay/agent.lock /run/overlay/state.json /var/lib/overlay/agent-id /var/lib/overlay/agent.lock /var/lib/overlay/instance " +
			"/var/lib/overlay/lease.json /var/lib/overlay/pki/ca.pem /var/lib/overlay/pki/identity.pem"
		coordinators = "/etc/overlay/overlay.yaml /var/lib/overlay/cluster.json /var/lib/overlay/coordinator.sock /var/lib/overlay/pki/cluster.key /var/lib/overlay/pki/roots.json"
		called       = "called: agent teardown --force --config /etc/overlay/agent.yaml"
		listen       = `perl -MIO::Socket::UNIX -e '$s = IO::Socket::UNIX->new(Local => shift, Listen => 1) or die $!; exit system(@ARGV) >> 8' /var/lib/overlay/coordinator.sock `
	)
	for _, tt := range []struct{ name, script, before, run, want string }{
		{"agent", "agent", agent, "", called},
		{"agent, a directory elsewhere in its file, which is broken", "agent",
			agent + `printf '#!/bin/sh\necho "$@" >>/run/called; [ $# -eq 3 ]\n' >/var/lib/overlay/overlayd.teardown` + "\n", "", called + " agent teardown --force"},
		{"agent, coordinator on a file", "agent", agent + coordinator + "touch " + file + "\n", "",
			strings.Replace(coordinators, "cluster.json ", "cluster.json "+file+" ", 1) + " " + called},
		{"agent, coordinator on etcd", "agent", agent + coordinator, "", coordinators + " " + called},
		{"agent, one that runs", "agent", agent, "flock /run/overlay/agent.lock ", agents},
		{"coordinator", "coordinator", coordinator, "", ""},
		{"coordinator, agent", "coordinator", agent + coordinator, "", strings.Replace(agents, "pki/ca.pem", "overlayd.teardown /var/lib/overlay/pki/ca.pem", 1)},
		{"coordinator, one that runs", "coordinator", "mkdir -p /var/lib/overlay/pki; touch /var/lib/overlay/coordinator.db\n", listen, "/var/lib/overlay/coordinator.db /var/lib/overlay/coordinator.sock"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			script, err := os.ReadFile("../conf/packages/scripts/" + tt.script + "-postremove")
			if err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command("unshare", "--mount", "sh", "-ec", `
for d in /etc /run /var/lib; do mount -t tmpfs none $d; done
mkdir -p /etc/overlay /run/overlay /var/lib/overlay/pki
`+tt.before+tt.run+`sh -ec "$0" sh purge >&2
find /etc /run /var/lib ! -type d ! -name called | LC_ALL=C sort
[ ! -e /run/called ] || echo "called: $(cat /run/called)"`, string(script)).Output()
			if got := strings.Join(strings.Fields(string(out)), " "); err != nil || got != tt.want {
				t.Errorf("left\n%s (%v), want\n%s", got, err, tt.want)
			}
		})
	}
}

// `systemctl help` shows the page that a unit names, where the packages have it.
func TestTreeUnits(t *testing.T) {
	packaged, err := os.ReadFile("../conf/packages/common.yaml")
	must(t, err)
	units, err := filepath.Glob("../conf/examples/systemd/*.service")
	must(t, err)
	for _, path := range units {
		unit, err := os.ReadFile(path)
		must(t, err)
		named := regexp.MustCompile(`(?m)^Documentation=man:overlayd-[a-z]+\((\d)\)$`).FindStringSubmatch(string(unit))
		if named == nil || !strings.Contains(string(packaged), "/man/overlayd*."+named[1]+".gz") {
			t.Errorf("%s: Documentation names %v, which is not in the section of the packages' pages", path, named)
		}
	}
}
