package repair

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// page is docs/repair.md.
func page(r *record) string {
	var b strings.Builder
	b.WriteString(`# What is repaired, and how fast

Made by ` + "`make soak`" + ` (` + "`go test ./integration/repair -full -doc`" + `): two hosts, kernel datapath, an IPv4 and an IPv6 overlay. On one host each fault is made while a container of it sends
100 packets a second to a container on the other host, another the same by IPv6, and the first to a machine outside. A fault counts as repaired when every link, address, route, neighbour, forwarding entry,
sysctl and rule is as it was before; the test fails where that takes more than three seconds, or ten for what the kernel announces to nobody. All of it with one build, on 2 cores shared with other work, Linux 6.18.

`)
	for _, named := range []bool{false, true} {
		if named {
			b.WriteString("\nWhat is somebody else's object stays, and stands in the status of the overlay or the host. It is taken away again as soon as it is named; packets are lost until then.\n\n")
			b.WriteString("| fault | firewall | named after | lost: IPv4, IPv6, outside | named by |\n|---|---|---|---|---|\n")
		} else {
			b.WriteString("| fault | firewall | repaired after | lost: IPv4, IPv6, outside | counted as |\n|---|---|---|---|---|\n")
		}
		for _, f := range faults {
			if (f.named != "") != named {
				continue
			}
			for _, firewall := range firewalls {
				o, ok := r.Faults[firewall][f.name]
				if !ok {
					continue
				}
				last := o.Drift
				if named {
					last = "... " + f.named
				}
				fmt.Fprintf(&b, "| %s | %s | %v | %d, %d, %d | %s |\n", f.name, firewall, o.Took.Round(10*time.Millisecond), o.Lost[0], o.Lost[1], o.Lost[2], last)
			}
		}
	}
	b.WriteString(`
Real programs of Debian 12 on the host, their defaults. Longest: the longest time in which a stream had no answer; with n, medians, and the least and the most of it. NetworkManager takes every device for one that is set up by others ("connected (externally)"), and
leaves it as it is; told by the file that ` + "`overlayctl doctor`" + ` has one write, it does not look at those of the overlays ("unmanaged").

| what | firewall of the agent | longest | lost: IPv4, IPv6, outside | named by |
|---|---|---|---|---|
`)
	for _, e := range r.events() {
		fmt.Fprintf(&b, "| %s | %s | %s | %d, %d, %d | %s |\n", e.Event, e.Firewall, e.longest(), e.Lost[0], e.Lost[1], e.Lost[2], e.Named)
	}
	return b.String()
}

// checkPage finds faults that the page does not have.
func checkPage(t *testing.T) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(top, "docs", "repair.md"))
	must(t, err)
	for _, f := range faults {
		if !strings.Contains(string(b), "| "+f.name+" |") {
			t.Errorf("docs/repair.md has no row %q; make soak writes it anew", f.name)
		}
	}
}
