package repair

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// release is the build that users had before.
const release = "a41295f"

// TestLoss: what happens to agents and configuration costs no packet between
// containers of two hosts, nor one to outside.
func TestLoss(t *testing.T) {
	packets := 200
	if *full {
		packets = 3000
	}
	t.Run("agents", func(t *testing.T) {
		x := newSite(t, "iptables-nft")
		x.keepsAll("kill -9", packets, func(int) {
			for _, h := range x.Agents {
				h.Proc.Kill()
				must(t, x.StartAgent(h))
			}
		})
		if !*full {
			return // the release before would have to be built
		}
		now, before := x.Bin, previous(t)
		x.keepsAll("binary swapped, there and back", packets, func(i int) {
			x.Bin = []string{before, now}[i%2]
			for _, h := range x.Agents {
				h.Datapath = []string{"", "kernel"}[i%2] // the release knows no other
				must(t, h.Proc.Stop())
				must(t, x.StartAgent(h))
			}
		})
		x.Bin = now
	})
	if *full { // TestFirewallSwitch of the datapath does the same
		t.Run("firewall", func(t *testing.T) {
			x := newSite(t, "iptables-nft")
			x.keepsAll("firewall switched", packets, func(i int) {
				must(t, os.Setenv("OVERLAYD_FIREWALL", []string{"nftables", "iptables"}[i%2]))
				for _, h := range x.Agents {
					must(t, h.Proc.Stop())
					must(t, x.StartAgent(h))
				}
			})
		})
	}
	t.Run("isolation", func(t *testing.T) {
		x := newSite(t, "nftables")
		const third = "     - {name: third, subnet: 11.0.0.0/8, prefix: 24, isolation: %s}\n"
		x.keepsAll("isolation of another overlay switched", packets, func(i int) {
			must(t, x.Coordinator.Stop())
			mode := []string{"none", "overlay", "strict"}[i%3]
			must(t, x.Coordinator.Reconfigure(t.Context(), x.Config+fmt.Sprintf(third, mode)))
			x.wait("the agents to have it", 15*time.Second, func() error {
				b, err := x.h.Get(t.Context(), "/overlay-agent/overlay")
				if err == nil && (!strings.Contains(string(b), `"third"`) || !strings.Contains(string(b), `"isolation":"`+mode)) {
					err = fmt.Errorf("the document is %s", b)
				}
				return err
			})
		})
	})
}

// keepsAll repeats something until so many packets were sent on each stream, and
// none may be lost.
func (x *site) keepsAll(what string, packets int, again func(i int)) {
	t := x.t
	t.Helper()
	streams := x.streams()
	rounds := 0
	for done := false; !done; rounds++ {
		again(rounds)
		for _, h := range x.Agents {
			must(t, h.WaitReady(t.Context()))
		}
		done = true
		for _, s := range streams {
			s.mu.Lock()
			done = done && len(s.sent) >= packets
			s.mu.Unlock()
		}
	}
	for _, s := range streams {
		sent, lost := s.finish()
		if lost > 0 || rounds < 2 {
			t.Errorf("%s, %d times: %d of %d packets to %s were lost", what, rounds, lost, sent, s.to)
		} else {
			t.Logf("%s, %d times: 0 of %d packets to %s were lost", what, rounds, sent, s.to)
		}
	}
}

// previous has the programs of the release before, or where the history does not
// have it, of this tree.
func previous(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if exec.Command("git", "-C", top, "cat-file", "-e", release+"^{commit}").Run() != nil {
		t.Logf("the history has no %s; this build is swapped for itself", release)
		must(t, build(top, dir))
		return dir
	}
	tree := filepath.Join(t.TempDir(), "tree")
	// Not a worktree of git's: this test may be killed.
	script := fmt.Sprintf("mkdir %[1]s && git -C %[2]s archive %[3]s | tar -x -C %[1]s", tree, top, release)
	if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	must(t, build(tree, dir))
	return dir
}
