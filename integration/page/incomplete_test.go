package page

import (
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// startEtcd starts a cluster of one member on this machine, and returns its URL.
func startEtcd(t *testing.T) string {
	t.Helper()
	urls := make([]string, 2)
	for i := range urls {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		urls[i] = "http://" + l.Addr().String()
		must(t, l.Close())
	}
	cmd := exec.Command("etcd", "--data-dir", t.TempDir(), "--listen-client-urls", urls[0], "--advertise-client-urls", urls[0],
		"--listen-peer-urls", urls[1], "--initial-advertise-peer-urls", urls[1], "--initial-cluster", "default="+urls[1])
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get(urls[0] + "/health")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return urls[0]
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("etcd does not answer: %v", err)
		}
	}
}

// TestIncomplete: the page says that it does not know everything, and why: an agent is
// connected that has not reported, and a coordinator is gone that others report to.
func TestIncomplete(t *testing.T) {
	if _, err := exec.LookPath("etcd"); err != nil {
		t.Skip("etcd is not installed; scripts/setup does it")
	}
	br := browser(t)
	store := "etcd:" + startEtcd(t)
	c, second := startCoordinator(t, "--store", store), startCoordinator(t, "--store", store)
	a := &agent{c: c, id: "silent", ip: netip.MustParseAddr("172.20.0.1")}
	must(t, a.register(t.Context()))
	must(t, a.status(t.Context()))
	c.connect([]*agent{a})

	v := open(t, br, 1280, 800)
	v.visit(c.url + "/")
	v.wait("that an agent has not reported", "document.querySelector('.findings')?.innerText.includes('containers and addresses are incomplete: 1 connected agent to report yet')")
	if text := v.text(".tiles"); !strings.Contains(text, "attached, and maybe more") {
		t.Errorf("the tiles say %q", text)
	}
	v.goTo("#/containers")
	v.wait("it beside the list", "document.querySelector('.view .count')?.innerText === '0 containers, incomplete: 1 agent to report yet'")
	// What doctor found on its host comes with the report, and is shown as doctor says it.
	a.problems = []string{"doctor: error: the certificate has run out: <b>renew</b> it"}
	must(t, a.report(t.Context(), true, []object{a.attachment(1, "web")}, nil, a.usage(1)))
	v.wait("that all is there", "document.querySelector('.view .count')?.innerText === '1 container'")
	v.goTo("#/overview")
	v.wait("what doctor says", `document.querySelector('.findings [data-severity=error]')?.innerText.includes('silent at 172.20.0.1: the certificate has run out: <b>renew</b> it')`)
	a.problems = nil
	must(t, a.report(t.Context(), true, []object{a.attachment(1, "web")}, nil, a.usage(1)))
	v.wait("nothing wrong", "document.querySelector('.fine')")

	second.killed = true
	must(t, second.process.Kill())
	v.do()
	// It is missed from when its stream ends until it counts no longer, 10 to 15 seconds;
	// the page looks every 30 by itself. So it looks as when somebody comes back to the
	// tab, over and over: one look may come before the coordinator has noticed.
	v.wait("that a coordinator is missed", "(document.dispatchEvent(new Event('visibilitychange')), document.querySelector('.findings')?.innerText.includes('cannot be reached'))")
	if text, port := v.text(".findings"), second.url[strings.LastIndexByte(second.url, ':'):]; !strings.Contains(text, "containers and addresses are incomplete: the coordinator http://") || !strings.Contains(text, port) {
		t.Errorf("what is wrong: %q, want the coordinator at %s", text, second.url)
	}
}
