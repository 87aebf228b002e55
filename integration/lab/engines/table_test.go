//go:build engines

package engines

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// table collects what was run. It is printed when the test that made it ends,
// and written to the file in OVERLAY_RUNTIMES_TABLE, if that is set.
type table struct {
	rows [][3]string // runtime, version, result
}

// notRun are the runtimes people use that cannot be had on a bare Debian
// machine, and what stands for them.
var notRun = [][3]string{
	{"Mesos agent", "-", "not run: does not build here within reason; its isolator's calls are replayed"},
	{"Docker 28 and 29", "-", "not run: not in Debian 12; a moby v2 beta stands for them where it was built (`ENGINES_MOBY=1 scripts/engines`)"},
	{"Podman 5 and later (netavark)", "-", "not run: not in Debian 12"},
	{"nerdctl, crictl", "-", "not run: neither in Debian 12 nor to be built here; CRI is called by a client of the tests"},
	{"Nomad", "-", "not run: neither in Debian 12 nor to be built here"},
}

func newTable(t *testing.T) *table {
	tab := new(table)
	t.Cleanup(func() {
		text := tab.String()
		t.Logf("\n%s", text)
		if name := os.Getenv("OVERLAY_RUNTIMES_TABLE"); name != "" {
			if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
				t.Error(err)
			}
		}
	})
	return tab
}

func (tab *table) add(t *testing.T, runtime, version string) {
	result := "passed"
	if t.Failed() {
		result = "**failed**"
	}
	tab.rows = append(tab.rows, [3]string{runtime, version, result})
}

func (tab *table) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Runtimes\n\n"+
		"Written by the runtime tests (`make integration`). Passed means: on two hosts, a container launched by the\n"+
		"real program has the address the program reports, pings and reads the one on the other host over IPv4\n"+
		"and IPv6, is reached through a host port where the runtime has them, and leaves nothing behind. The images\n"+
		"are made on the machine; no registry is asked.\n\n"+
		"| runtime | version | result |\n|---|---|---|\n")
	for _, r := range append(tab.rows, notRun...) {
		fmt.Fprintf(&b, "| %s | %s | %s |\n", r[0], r[1], r[2])
	}
	return b.String()
}
