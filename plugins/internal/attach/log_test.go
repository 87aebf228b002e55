package attach

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"overlayd.internal/overlay/internal/calls"
)

// TestCallsAreRecorded: what the programs did stands in the run directory, and
// nothing that is a secret.
func TestCallsAreRecorded(t *testing.T) {
	m := newMachine(t)
	const secret = "hunter2"
	c := call{netns: newNamespace(t).path, env: []string{"CNI_ARGS=IgnoreUnknown=1;K8S_TOKEN=" + secret, "PASSWORD=" + secret},
		conf: m.config("dcos", "1.1.0", "password", secret, "args", map[string]any{"labels": map[string]any{"token": secret}})}
	m.add(c)
	c.command = "STATUS"
	m.ok(c)
	c.command, c.conf["mtu"] = "ADD", 1
	m.refused(c, types.ErrInvalidNetworkConfig, "mtu")
	delete(c.conf, "mtu")
	c.command = "DEL"
	m.ok(c)
	m.exec(call{command: "DEL", conf: map[string]any{"name": "no/name", "runDir": m.run, "password": secret}})

	b, err := os.ReadFile(filepath.Join(m.run, "cni.log"))
	if err != nil {
		t.Fatal(err)
	}
	want := regexp.MustCompile(`^time=\S+Z program=d-overlay verb=ADD result=ok took=\d+\.\d\dms network=dcos container=c1 ifname=eth0
time=\S+Z program=d-overlay verb=ADD result=failed took=\S+ms network=dcos container=c1 ifname=eth0 code=7 err="mtu 1: .*"
time=\S+Z program=d-overlay verb=DEL result=ok took=\S+ms network=dcos container=c1 ifname=eth0
$`)
	if !want.Match(b) || strings.Contains(string(b), secret) {
		t.Errorf("the log is\n%s", b)
	}
	counts, err := calls.Read(m.run)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for _, c := range counts {
		got[c.Program+" "+c.Verb+" "+c.Result] = c.Total()
		if c.Sum <= 0 {
			t.Errorf("%+v took no time", c)
		}
	}
	for what, n := range map[string]uint64{"d-overlay ADD ok": 1, "d-overlay ADD failed": 1, "d-overlay DEL ok": 1, "d-overlay STATUS ok": 1} {
		if got[what] != n {
			t.Errorf("%s: counted %d times, want %d", what, got[what], n)
		}
	}
}
