package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// The agent whom docs/operations.md takes out.
const (
	leavingID = "8cbef821a8b2e2148f73f5cf498457fd"
	leavingIP = "172.17.0.4"
)

// walkPages are the pages that are followed on hosts where nothing runs but what they
// say, and what was there before: a coordinator, an agent.
var walkPages = map[string]struct{ coordinator, agent bool }{
	"docs/api.md":                 {coordinator: true},
	"docs/firewall.md":            {coordinator: true, agent: true},
	"docs/guide.md":               {},
	"docs/migrating-from-dcos.md": {coordinator: true},
	"docs/operations.md":          {coordinator: true, agent: true},
	"docs/runtimes/containerd.md": {coordinator: true},
	"docs/runtimes/mesos.md":      {coordinator: true},
	"docs/security.md":            {},
}

// TestDocsWalk follows pages from the coordinator's host to another one, with the default
// directories, word for word but for the token.
func TestDocsWalk(t *testing.T) {
	t.Parallel()
	pages := map[string][]lab.Block{}
	for _, b := range blocks(t) {
		if b.Lang == "sh" && (strings.HasPrefix(b.Mark, "test first") || strings.HasPrefix(b.Mark, "test second")) {
			if _, ok := walkPages[b.Page]; !ok {
				t.Errorf("%s: walkPages does not say what there is before", b.At())
			}
			pages[b.Page] = append(pages[b.Page], b)
		}
	}
	for page, before := range walkPages {
		t.Run(page, func(t *testing.T) {
			t.Parallel()
			if len(pages[page]) == 0 {
				t.Fatal("it has no block for this test")
			}
			w := newWalk(t, page)
			if before.coordinator {
				w.daemon("first", "overlayd coordinator --config /etc/overlay/overlay.yaml")
				w.run("second", "cat >/etc/overlay/join-token <<<"+w.run("first", "overlayctl token create"))
			}
			if before.agent {
				w.daemon("second", "overlayd agent --config /etc/overlay/agent.yaml --agent-id "+leavingID+" --agent-ip "+leavingIP)
			}
			for _, b := range pages[page] {
				w.follow(b)
			}
		})
	}
}

// walk is two hosts that keep what commands leave there.
type walk struct {
	t       *testing.T
	lab     *lab.Lab
	nodes   map[string]*lab.Node
	holders map[string]*lab.Proc // hold the mounts
	daemons map[string]*lab.Proc // the last one that was started there
	token   string
	began   int
}

// walkInit makes the inside of a host: directories of its own in place of those that the
// programs use by default, with the configurations that the pages speak of. $0 is the top
// of the tree, $1 the firewall that the agent is to take.
const walkInit = `
mount -t tmpfs none /mnt && cp -a /etc/. /mnt/ && mount --move /mnt /etc
for dir in run var/lib opt root; do mount -t tmpfs none /$dir; done
rm -rf /etc/overlay /etc/cni/net.d && mkdir -p /etc/overlay /etc/cni/net.d /etc/cni/overlay.d /etc/mesos/cni /run/netns
# As after an edit: with one overlay more.
sed 's/^\( *\)overlays:$/&\n\1  - {name: more, subnet: 10.200.0.0\/16, prefix: 24}/' "$0/conf/examples/overlay.yaml" >/etc/overlay/edited.yaml
cp "$0/conf/examples/overlay.yaml" /etc/overlay/overlay.yaml
sed "s/^firewall: .*/firewall: $1/" "$0/conf/examples/agent.yaml" >/etc/overlay/agent.yaml
cp "$0/conf/examples/dcos-state.json" /root/state.json
touch /run/begun
exec sleep infinity`

func newWalk(t *testing.T, page string) *walk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	l, err := lab.New(t.Context(), options())
	must(t, err)
	w := &walk{t: t, lab: l, nodes: map[string]*lab.Node{}, holders: map[string]*lab.Proc{}, daemons: map[string]*lab.Proc{}}
	t.Cleanup(func() {
		if races := l.Races(); races != "" {
			t.Errorf("the race detector says:\n%s", races)
		}
		if t.Failed() {
			l.Logs(t.Output(), 30)
		}
		must(t, l.Close())
	})
	tree, err := filepath.Abs(top)
	must(t, err)
	firewall := "auto"
	if page == "docs/firewall.md" {
		firewall = "nftables"
	}
	for name, at := range map[string]struct {
		n         byte
		addresses []string
	}{
		// The coordinator's in the pages, and the agent's.
		"first":  {2, []string{"10.10.0.120/24", "10.0.0.1/24"}},
		"second": {4, []string{"10.10.0.117/24", "10.0.0.2/24"}},
	} {
		n, err := l.Node(t.Context(), name, at.n)
		must(t, err)
		for _, a := range at.addresses {
			must(t, n.Configure(t.Context(), "address add "+a+" dev eth0"))
		}
		w.nodes[name] = n
		w.holders[name], err = l.Start(n.Netns, "host-"+name, "unshare", "--mount", "--propagation", "private", "bash", "-euo", "pipefail", "-c", walkInit, tree, firewall)
		must(t, err)
		wait(t, name+" to begin", 20*time.Second, func() error {
			_, err := os.Stat(fmt.Sprintf("/proc/%d/root/run/begun", w.holders[name].Pid()))
			return err
		})
	}
	return w
}

// on is a command line that runs a script on a host.
func (w *walk) on(host, script string) []string {
	return []string{"nsenter", "--mount", "--target", fmt.Sprint(w.holders[host].Pid()), "--wdns=/root", "--", "env", "HOME=/root", "XDG_CONFIG_HOME=", "PATH=" + binDir + ":" + os.Getenv("PATH"),
		"bash", "-euo", "pipefail", "-c", script}
}

// run runs a script to its end and returns what it prints.
func (w *walk) run(host, script string) string {
	w.t.Helper()
	cmd := w.nodes[host].Command(w.t.Context(), w.on(host, script)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		w.t.Fatalf("on %s: %v\n%s\nprints:\n%s%s", host, err, script, out, &stderr)
	}
	return string(out)
}

// ready is what says that a daemon is at work.
var ready = map[string]string{
	"overlayd coordinator": "curl --silent --fail --unix-socket /var/lib/overlay/coordinator.sock http://localhost/readyz",
	"overlayd agent":       "curl --silent --fail --unix-socket /run/overlay/overlayd.sock http://agent/readyz",
	"overlayctl page":      "",
}

// daemon starts what goes on, in place of another agent that runs there, and waits until
// it is at work.
func (w *walk) daemon(host, script string) {
	w.t.Helper()
	command := strings.Join(strings.Fields(script)[:2], " ")
	asks, known := ready[command]
	if !known {
		w.t.Fatalf("how is it seen that %s is at work?", command)
	}
	w.stop(host, command)
	w.began++
	p, err := w.lab.Start(w.nodes[host].Netns, fmt.Sprintf("%d-%s", w.began, strings.ReplaceAll(command, " ", "-")), w.on(host, "exec "+strings.TrimSpace(script))...)
	must(w.t, err)
	w.daemons[host+" "+command] = p
	wait(w.t, command+" to be at work", 30*time.Second, func() error {
		if fate := p.Fate(); fate != "running" {
			return fmt.Errorf("it has ended: %s", fate)
		}
		if asks == "" { // it prints a link
			said, err := os.ReadFile(p.Log)
			if err == nil && !strings.Contains(string(said), "http://127.0.0.1:") {
				err = fmt.Errorf("it says %q", said)
			}
			return err
		}
		out, err := w.nodes[host].Command(w.t.Context(), w.on(host, asks)...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	})
}

func (w *walk) stop(host, command string) {
	w.t.Helper()
	if p := w.daemons[host+" "+command]; p != nil {
		must(w.t, p.Stop())
		delete(w.daemons, host+" "+command)
	}
}

var tokenWord = regexp.MustCompile(`ovl1_[a-z0-9_]{20,}`)

// follow does what a block says, and what the page says before it.
func (w *walk) follow(b lab.Block) {
	w.t.Helper()
	host := strings.Fields(b.Mark)[1]
	switch {
	case strings.HasPrefix(b.Script, "overlayctl overlays plan"):
		w.run("first", "cp /etc/overlay/edited.yaml /etc/overlay/overlay.yaml")
	case strings.HasPrefix(b.Script, "overlayctl overlays drain"):
		wait(w.t, "all hosts to have told what they have", 60*time.Second, func() error {
			if out := w.run("first", "overlayctl ipam show --all -o json"); strings.Contains(out, `"unreported"`) && !strings.Contains(out, `"unreported": 0`) {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
	case strings.HasPrefix(b.Script, "overlayctl agents revoke"), strings.HasPrefix(b.Script, "overlayd agent teardown"):
		w.stop("second", "overlayd agent")
	}
	script := strings.ReplaceAll(b.Script, "ovl1_...", w.token)
	if strings.HasSuffix(b.Mark, " daemon") {
		script, _, _ = strings.Cut(script, "#")
		w.daemon(host, script)
		return
	}
	if said := tokenWord.FindString(w.run(host, script)); said != "" {
		w.token = said
	}
}
