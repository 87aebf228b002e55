package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// pinger sends 100 packets a second.
type pinger struct {
	cmd *exec.Cmd
	log string // what it prints
}

func startPing(t *testing.T, from, to *lab.Container) *pinger {
	t.Helper()
	p := &pinger{log: filepath.Join(t.TempDir(), "ping")}
	out, err := os.Create(p.log)
	must(t, err)
	defer out.Close()
	p.cmd = from.Command(t.Context(), "ping", "-n", "-i", "0.01", "-W", "2", to.Addr().String())
	p.cmd.Stdout, p.cmd.Stderr = out, out
	must(t, p.cmd.Start())
	return p
}

func (p *pinger) printed(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(p.log)
	must(t, err)
	return string(b)
}

var sequence = regexp.MustCompile(`icmp_seq=(\d+) ttl`)

// stop returns how many packets were answered, and how many before the last that was
// were not.
func (p *pinger) stop(t *testing.T) (answered, lost int) {
	t.Helper()
	must(t, p.cmd.Process.Signal(syscall.SIGINT))
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("ping: %v: %s", err, p.printed(t))
	}
	seen, last := map[int]bool{}, 0
	for _, m := range sequence.FindAllStringSubmatch(p.printed(t), -1) {
		n, err := strconv.Atoi(m[1])
		must(t, err)
		seen[n] = true
		last = max(last, n)
	}
	for n := 1; n < last; n++ {
		if !seen[n] {
			t.Logf("packet %d of %d to %s was not answered", n, last, p.cmd.Args[len(p.cmd.Args)-1])
		}
	}
	return len(seen), last - len(seen)
}

// networks is a cluster whose configuration changes while containers that no change
// concerns ping each other.
type networks struct {
	*lab.Seed
	pairs [][2]*lab.Container
	c, d  *lab.Container // of the overlay that changes
	short bool           // without what goes back to a form that was there before
}

func (n *networks) config(overlays ...string) string {
	return n.Config + strings.Join(overlays, "")
}

// file writes a configuration.
func (n *networks) file(t *testing.T, overlays ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "overlay.yaml")
	must(t, os.WriteFile(path, []byte(n.config(overlays...)), 0o644))
	return path
}

// during makes a change, waits until it has arrived on all hosts, and counts what
// was lost meanwhile.
func (n *networks) during(t *testing.T, name string, change func(t *testing.T)) {
	t.Helper()
	ok := t.Run(name, func(t *testing.T) {
		var pings []*pinger
		for _, p := range n.pairs {
			pings = append(pings, startPing(t, p[0], p[1]))
		}
		began := time.Now()
		change(t)
		took := time.Since(began)
		least := 200 // some more, for what comes late
		if n.short {
			least = 100
		}
		for _, p := range pings {
			wait(t, fmt.Sprint(least, " answers"), 10*time.Second, func() error {
				if c := strings.Count(p.printed(t), "icmp_seq"); c < least {
					return fmt.Errorf("%d", c)
				}
				return nil
			})
		}
		answered, lost := 0, 0
		for _, p := range pings {
			a, l := p.stop(t)
			answered, lost = answered+a, lost+l
		}
		t.Logf("on all hosts within %v; %d answered, %d lost", took.Round(time.Millisecond), answered, lost)
		if lost > 0 {
			t.Errorf("%d packets of containers that the change does not concern were lost", lost)
		}
	})
	if !ok {
		t.FailNow() // the next change begins where this one ends
	}
}

func (n *networks) ctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.Overlayctl(t.Context(), append([]string{"overlays"}, args...)...)
	must(t, err)
	return out
}

// refuses runs overlayctl overlays, which must fail with code 1 and say something.
func (n *networks) refuses(t *testing.T, says string, args ...string) {
	t.Helper()
	_, err := n.Overlayctl(t.Context(), append([]string{"overlays"}, args...)...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(err.Error(), says) {
		t.Errorf("overlays %v: %v, want exit code 1 and %q", args, err, says)
	}
}

// there waits until every agent publishes the overlay in a certain form, with
// bridges, and files for the runtimes.
func (n *networks) there(t *testing.T, overlay string, form ...string) {
	t.Helper()
	for _, h := range n.Agents {
		wait(t, overlay+" on "+h.Name, 20*time.Second, func() error {
			b, err := os.ReadFile(filepath.Join(h.RunDir, "state.json"))
			if err != nil {
				return err
			}
			i := bytes.Index(b, []byte(`"name":"`+overlay+`"`))
			if i < 0 {
				return errors.New("not published")
			}
			text := string(b[max(0, i-200):min(len(b), i+200)])
			for _, f := range form {
				if want, not := strings.CutPrefix(f, "!"); strings.Contains(text, want) == not {
					return fmt.Errorf("%q: in %s", f, text)
				}
			}
			_, err = h.Run(t.Context(), "ip", "link", "show", "dev", "m-"+overlay, "up")
			for _, f := range n.filesOf(h, overlay) {
				_, ferr := os.Stat(f)
				err = errors.Join(err, ferr)
			}
			return err
		})
	}
}

func (n *networks) filesOf(h *lab.Host, overlay string) []string {
	return []string{filepath.Join(h.CNIConfDir, "87-"+overlay+".conflist"), filepath.Join(h.UCRConfDir, overlay+".conf")}
}

// gone waits until nothing of an overlay is left on any agent's host, wherever it is
// looked for.
func (n *networks) gone(t *testing.T, overlay, subnet string, looks [][]string) {
	t.Helper()
	for _, h := range n.Agents {
		wait(t, overlay+" to go from "+h.Name, 20*time.Second, func() error {
			for _, f := range n.filesOf(h, overlay) {
				if _, err := os.Stat(f); !errors.Is(err, os.ErrNotExist) {
					return fmt.Errorf("%s: %v", f, err)
				}
			}
			for _, look := range looks {
				out, err := h.Run(t.Context(), look...)
				if err != nil {
					return err
				}
				for line := range strings.SplitSeq(out, "\n") {
					if strings.Contains(line, "-"+overlay) || strings.Contains(line, subnet) {
						return fmt.Errorf("%v: %s", look, line)
					}
				}
			}
			return nil
		})
	}
}

// TestNetworksAtRunTime: every change of the configuration while the cluster runs,
// under pings between containers that it does not concern. With two coordinators on etcd
// the file, what is refused, and ways back are left to the full length.
func TestNetworksAtRunTime(t *testing.T) {
	t.Parallel()
	for _, store := range []string{"bbolt", "etcd"} {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			n := upNetworks(t, store == "etcd")
			n.short = store == "etcd" && !*full
			n.changes(t)
			if !n.short {
				n.undrain(t)
				n.refusals(t)
			}
			n.removal(t)
			if !n.short {
				n.reloads(t)
			}
			n.Containers = nil // but those that are left
			for _, p := range n.pairs {
				n.Containers = append(n.Containers, p[0], p[1])
			}
			checkTraffic(t, n.Seed)
		})
	}
}

func upNetworks(t *testing.T, etcd bool) *networks {
	t.Helper()
	o := options()
	o.Secure, o.Etcd = true, etcd
	n := &networks{Seed: makeSeed(t, `
dcos_overlay_network:
  vtep_subnet: 44.128.0.0/20
  vtep_subnet6: fd01:a::/64
  vtep_mac_oui: 70:B3:D5:00:00:00
  overlays:
    - {name: dcos, subnet: 9.0.0.0/8, prefix: 24}
    - {name: dcos6, subnet6: fd01:b::/64, prefix6: 80}
`, o)}
	must(t, n.Agents[1].Configure(t.Context(), "route add 14.1.0.0/16 dev eth0"))
	must(t, n.Up(t.Context()))
	for _, overlay := range lab.SeedOverlays {
		a := place(t, n.Seed, 0, overlay+"-a", overlay, lab.Mesos)
		b := place(t, n.Seed, 1, overlay+"-b", overlay, lab.Docker)
		// What follows is not about the moments after an agent's start.
		wait(t, "the way between hosts to have settled", 20*time.Second, func() error {
			_, err := a.Netns.Ping(t.Context(), b.Addr(), 100)
			return err
		})
		n.pairs = append(n.pairs, [2]*lab.Container{a, b})
	}
	return n
}

// The overlay that comes, changes and goes.
const (
	late   = "    - {name: late, subnet: 10.0.0.0/16, prefix: 24}\n"
	larger = "    - {name: late, subnet: 10.0.0.0/15, prefix: 24}\n"
	strict = "    - {name: late, subnet: 10.0.0.0/15, prefix: 24, isolation: strict, antispoof: false}\n"
	off    = "    - {name: late, subnet: 10.0.0.0/15, prefix: 24, enabled: false}\n"
	dual   = "    - {name: late, subnet: 10.0.0.0/15, prefix: 24, subnet6: fd01:c::/64, prefix6: 80}\n"
	moved  = "    - {name: late, subnet: 11.0.0.0/16, prefix: 24}\n"
	more   = "    - {name: more, subnet: 12.0.0.0/16, prefix: 24}\n"
)

// talk has the containers of that overlay reach each other.
func (n *networks) talk(t *testing.T) {
	t.Helper()
	waitPing(t, n.c.Netns, n.d.Addr(), 60*time.Second)
}

// changes are all that hosts apply while traffic flows.
func (n *networks) changes(t *testing.T) {
	n.during(t, "add overlay", func(t *testing.T) {
		if plan := n.ctl(t, "plan", n.file(t, late)); !strings.Contains(plan, "added, with 10.0.0.0/16") {
			t.Errorf("the plan is\n%s", plan)
		}
		n.ctl(t, "apply", n.file(t, late))
		n.there(t, "late")
		must(t, n.WaitMesh(t.Context()))
		n.c, n.d = place(t, n.Seed, 0, "late-c", "late", lab.Mesos), place(t, n.Seed, 1, "late-d", "late", lab.Docker)
		n.talk(t)
	})
	for _, change := range []struct {
		name, overlay string
		form          []string
	}{
		{"enlarge subnet", larger, []string{`"subnet":"10.0.0.0/15"`}},
		{"isolation and antispoof", strict, []string{`"isolation":"strict"`, `"antispoof":false`}},
		{"isolation back", larger, []string{`!"isolation"`, `!"antispoof"`}},
		{"disable", off, []string{`"enabled":false`}},
		{"enable", larger, []string{`!"enabled"`}},
		{"add IPv6", dual, []string{`"subnet6":"fd01:c::/64"`, `"ip6":"fd01:c`}},
	} {
		if n.short && (change.name == "isolation back" || change.name == "enable") {
			continue // the next one does it as well
		}
		n.during(t, change.name, func(t *testing.T) {
			n.ctl(t, "apply", n.file(t, change.overlay))
			n.there(t, "late", change.form...)
			n.talk(t)
		})
	}
	n.during(t, "drain", func(t *testing.T) {
		n.ctl(t, "drain", "late")
		n.there(t, "late", `"draining":true`)
		if _, err := n.Agents[0].Attach(t.Context(), "late-no", "late", lab.Docker); err == nil || !strings.Contains(err.Error(), "overlay late is being drained") {
			t.Errorf("attached to a drained overlay: %v", err)
		}
		list := n.ctl(t, "list")
		if !strings.Contains(list, "drained; containers left on 172.17.0.3: 1, 172.17.0.4: 1") {
			t.Errorf("the list is\n%s", list)
		}
		n.talk(t)
	})
}

// undrain takes the last change back.
func (n *networks) undrain(t *testing.T) {
	n.during(t, "undrain", func(t *testing.T) {
		n.ctl(t, "undrain", "late")
		n.there(t, "late", `!"draining"`)
		e, err := n.Agents[0].Attach(t.Context(), "late-yes", "late", lab.Docker)
		must(t, err)
		must(t, e.Remove(t.Context()))
	})
}

// refusals are what does not happen.
func (n *networks) refusals(t *testing.T) {
	n.during(t, "refused", func(t *testing.T) {
		other := n.file(t, dual, "    - {name: other, subnet: 14.0.0.0/12, prefix: 24}\n")
		if plan := n.ctl(t, "plan", other); !strings.Contains(plan, "Overlap: 14.0.0.0/12 of other, and host 172.17.0.3 (agent") {
			t.Errorf("the plan does not name the route of a host:\n%s", plan)
		}
		n.refuses(t, "", "apply", n.file(t, moved))
		n.refuses(t, "", "apply", n.file(t))
		n.refuses(t, "drain it (overlayctl overlays drain late)", "remove", "late")
		n.talk(t)
	})
}

// removal drains the overlay and takes it away.
func (n *networks) removal(t *testing.T) {
	n.during(t, "remove", func(t *testing.T) {
		n.ctl(t, "drain", "late")
		must(t, errors.Join(n.c.Remove(t.Context()), n.d.Remove(t.Context())))
		wait(t, "the overlay to be removed", 20*time.Second, func() error {
			_, err := n.Overlayctl(t.Context(), "overlays", "remove", "late")
			return err
		})
		everything := [][]string{{"ip", "route"}, {"ip", "-6", "route"}, {"iptables-save"}, {"ip6tables-save"}, {"nft", "list", "ruleset"}, {"ip", "-br", "link"}}
		n.gone(t, "late", "10.0.", everything)
		n.gone(t, "late", "fd01:c:", everything)
	})
}

// reloads are changes by the file.
func (n *networks) reloads(t *testing.T) {
	reload := func(t *testing.T, text string) {
		t.Helper()
		must(t, os.WriteFile(n.Coordinator.File(), []byte(text), 0o644))
		must(t, syscall.Kill(n.Coordinator.Pid(), syscall.SIGHUP))
	}
	n.during(t, "SIGHUP", func(t *testing.T) {
		reload(t, n.config(more))
		n.there(t, "more")
		must(t, n.WaitMesh(t.Context()))
		n.c, n.d = place(t, n.Seed, 0, "more-c", "more", lab.Mesos), place(t, n.Seed, 1, "more-d", "more", lab.Docker)
		n.talk(t)
	})
	n.during(t, "config-reload bad YAML", func(t *testing.T) {
		reload(t, n.config(more)+"    - [\n")
		wait(t, "it to refuse the file", 10*time.Second, func() error { return n.Coordinator.LogContains("the configuration file was not applied") })
		n.there(t, "more")
		n.talk(t)
		reload(t, n.config(more))
	})
	n.during(t, "remove by force", func(t *testing.T) {
		n.ctl(t, "remove", "more", "--force")
		n.gone(t, "more", "12.0.", [][]string{{"ip", "route"}, {"iptables-save"}, {"ip", "-br", "link"}})
		if list := n.ctl(t, "list"); !strings.Contains(list, "in the file alone, not applied") {
			t.Errorf("the list is\n%s", list)
		}
		must(t, errors.Join(n.c.Delete(t.Context()), n.d.Delete(t.Context())))
	})
	n.during(t, "restart with the file as it was", func(t *testing.T) {
		must(t, n.Coordinator.Stop())
		must(t, n.Coordinator.Restart(t.Context()))
		if list := n.ctl(t, "list"); !strings.Contains(list, "in the file alone, not applied") {
			t.Errorf("the list is\n%s", list)
		}
	})
}
