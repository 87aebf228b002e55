package integration

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// crashConfig has one overlay whose halves have 5 addresses.
const crashConfig = `
vtep_subnet: 44.128.0.0/20
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
- {name: tight, subnet: 9.0.0.0/20, prefix: 28, blocks_per_agent: 4}
`

// blockCrash is a cluster whose programs die on the way of further blocks.
type blockCrash struct {
	*lab.Seed
	coordinators []*lab.Coordinator
	dir          string // where files lie that say where to die; below it one directory for each agent
	plugin       string // m-overlay of a build for tests
	agentArgs    []string
	began        time.Time
}

// perHost is how many containers a host gets: three blocks, of which the last is nearly
// empty.
const perHost = 12

// TestBlockCrash kills agents, coordinators and CNI programs at every step of the way of
// further blocks: asking, granting, storing, programming, publishing, retiring, giving
// back. No block ever has two owners and no address is given out twice, all hosts know
// the way to all blocks, and in the end every further block is free again. At full length
// it goes on to the other steps, and the same happens with two coordinators on etcd.
func TestBlockCrash(t *testing.T) {
	t.Parallel()
	for _, store := range stores() {
		t.Run(store, func(t *testing.T) {
			t.Parallel()
			b := newBlockCrash(t, store == "etcd")
			stop := b.watchOwners(t)
			defer stop()
			b.round(t, []string{"grant-planned", "grant-committed"}, []string{"return-planned", "return-committed"}, []crashes{
				{"lease-answered", "block-retired"}, {"lease-received", "return-stored"}, {"lease-stored", "return-published"},
				{"lease-programmed", "lease-answered"}, {"lease-published", "lease-received"},
			})
			b.plugins(t)
			if *full {
				b.round(t, nil, nil, []crashes{
					{"room-looked", "room-looked"}, {"lease-answered", "lease-stored"}, {"lease-received", "lease-programmed"},
					{"lease-stored", "lease-published"}, {"lease-programmed", "block-retired"},
				})
				b.restartAll(t)
			}
		})
	}
}

// crashes are the steps at which an agent dies while its host fills, and while it
// empties; empty: nowhere.
type crashes struct{ filling, emptying string }

func newBlockCrash(t *testing.T, etcd bool) *blockCrash {
	b := &blockCrash{dir: t.TempDir(), agentArgs: []string{"--block-idle", "1s", "--cooling", "1s", "--datapath", "kernel"}}
	bin := t.TempDir()
	programs, err := os.ReadDir(binDir)
	must(t, err)
	for _, p := range programs {
		if p.Name() != "overlayd" {
			must(t, os.Symlink(filepath.Join(binDir, p.Name()), filepath.Join(bin, p.Name())))
		}
	}
	crash := filepath.Join(bin, "crash")
	// Built as the others are, most of it is there already.
	daemon := []string{"-o", bin + "/", "./overlayd"}
	cgo := "0"
	if _, err := exec.LookPath("gcc"); err == nil {
		daemon, cgo = append([]string{"-race"}, daemon...), "1"
	}
	for _, b := range []struct {
		cgo  string
		args []string
	}{{cgo, daemon}, {"0", []string{"-o", crash + "/", "./plugins/m-overlay"}}} {
		cmd := exec.Command("go", slices.Concat([]string{"build", "-buildvcs=false", "-tags", "crashpoints"}, b.args)...)
		cmd.Dir, cmd.Env = top, append(os.Environ(), "CGO_ENABLED="+b.cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", cmd, err, out)
		}
	}
	b.plugin, b.began = filepath.Join(crash, "m-overlay"), time.Now()
	o := options()
	o.Bin, o.Secure, o.Etcd = bin, true, etcd
	b.Seed = makeSeed(t, crashConfig, o)
	ctx := t.Context()
	for i := range 3 {
		h, err := b.Host(ctx, fmt.Sprintf("more%d", i), byte(40+i))
		must(t, err)
		b.Agents = append(b.Agents, h)
	}
	must(t, b.StartCoordinator(ctx))
	b.coordinators = []*lab.Coordinator{b.Coordinator}
	if b.Second != nil {
		b.coordinators = append(b.coordinators, b.Second)
	}
	for _, c := range b.coordinators {
		c.Env = []string{"OVERLAY_CRASH_DIR=" + b.dir}
		must(t, c.Stop())
		must(t, c.Restart(ctx))
	}
	for _, h := range b.Agents {
		must(t, os.Mkdir(b.crashDir(h), 0o755))
		h.Env = []string{"OVERLAY_CRASH_DIR=" + b.crashDir(h)}
		must(t, h.StartAgent(b.Coordinator.URL, b.agentArgs...))
	}
	for _, h := range b.Agents {
		must(t, h.WaitRegistered(ctx, b.Coordinator))
	}
	return b
}

func (b *blockCrash) crashDir(h *lab.Host) string { return filepath.Join(b.dir, h.Name) }

// arm has a program die at a step.
func arm(t *testing.T, dir, step string) {
	t.Helper()
	if step != "" {
		must(t, os.WriteFile(filepath.Join(dir, step), nil, 0o644))
	}
}

// died waits until a program has died at a step, and starts it again.
func died(t *testing.T, what string, procs func() []*lab.Proc, dir, step string, restart func(i int) error) {
	if step == "" {
		return
	}
	err := lab.Wait(t.Context(), what+" to die at "+step, 60*time.Second, func() error {
		if _, err := os.Stat(filepath.Join(dir, step)); err == nil {
			return errors.New("it did not come there")
		}
		for i, p := range procs() {
			if fate := p.Fate(); fate == "signal: killed" {
				return restart(i)
			} else if fate != "running" {
				return fmt.Errorf("it ended otherwise: %s", fate)
			}
		}
		return errors.New("it lives")
	})
	if err != nil {
		t.Error(err)
	}
}

func (b *blockCrash) agentDies(t *testing.T, h *lab.Host, step string) {
	died(t, h.Name, func() []*lab.Proc { return []*lab.Proc{h.Proc} }, b.crashDir(h), step, func(int) error {
		return h.StartAgent(b.Coordinator.URL, b.agentArgs...)
	})
}

// coordinatorsDie has one die at each step, in turn.
func (b *blockCrash) coordinatorsDie(t *testing.T, steps []string) {
	for i, step := range steps {
		died(t, "a coordinator", func() (out []*lab.Proc) {
			for _, c := range b.coordinators {
				out = append(out, c.Proc)
			}
			return out
		}, b.dir, step, func(which int) error {
			if i+1 < len(steps) { // it may die there before it is ready
				arm(t, b.dir, steps[i+1])
				return b.coordinators[which].Start()
			}
			return b.coordinators[which].Restart(t.Context())
		})
	}
}

// round fills all hosts at once and empties them again, while programs die.
func (b *blockCrash) round(t *testing.T, filling, emptying []string, agents []crashes) {
	t.Logf("%v: filling", time.Since(b.began).Round(time.Millisecond))
	b.phase(t, filling, func(h *lab.Host, i int) (step string, work func()) {
		return agents[i].filling, func() { b.fill(t, h) }
	})
	b.converged(t)
	t.Logf("%v: emptying", time.Since(b.began).Round(time.Millisecond))
	b.phase(t, emptying, func(h *lab.Host, i int) (step string, work func()) {
		return agents[i].emptying, func() { b.empty(t, h) }
	})
	waitGivenBack(t, b.Seed, "tight")
	b.converged(t)
	if t.Failed() {
		t.FailNow()
	}
}

// phase has every host do its work while its agent dies at a step, and coordinators at
// others.
func (b *blockCrash) phase(t *testing.T, coordinators []string, of func(h *lab.Host, i int) (string, func())) {
	var all sync.WaitGroup
	if len(coordinators) > 0 {
		arm(t, b.dir, coordinators[0])
	}
	all.Go(func() { b.coordinatorsDie(t, coordinators) })
	for i, h := range b.Agents {
		step, work := of(h, i)
		arm(t, b.crashDir(h), step)
		all.Go(func() { b.agentDies(t, h, step) })
		all.Go(work)
	}
	all.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// fill has a host give out addresses. A program that finds no room tries again, as
// runtimes do.
func (b *blockCrash) fill(t *testing.T, h *lab.Host) {
	for i := range perHost {
		if err := lab.Wait(t.Context(), "an address on "+h.Name, 60*time.Second, func() error {
			_, out, err := ipam(t.Context(), h, "ADD", "tight", "docker", fmt.Sprint("c", i))
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}); err != nil {
			t.Error(err)
			return
		}
	}
}

func (b *blockCrash) empty(t *testing.T, h *lab.Host) {
	for i := range perHost {
		if _, out, err := ipam(t.Context(), h, "DEL", "tight", "docker", fmt.Sprint("c", i)); err != nil {
			t.Errorf("%s: %v: %s", h.Name, err, out)
		}
	}
}

// owned are the subnets that a host publishes.
func owned(h *lab.Host) (out []netip.Prefix, err error) {
	s, err := h.Published()
	if err != nil {
		return nil, err
	}
	for _, o := range s.Overlays {
		out = append(out, o.Subnet)
	}
	blocks, err := blocksOf(h, "tight")
	return append(out, blocks...), err
}

// watchOwners looks, all the time, whether two hosts publish one block.
func (b *blockCrash) watchOwners(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			owner := map[netip.Prefix]*lab.Host{}
			for _, h := range b.Agents {
				mine, _ := owned(h)
				for _, p := range mine {
					if other := owner[p]; other != nil {
						// It may have been given back between the two looks.
						if again, err := owned(other); err == nil && slices.Contains(again, p) {
							t.Errorf("%s is published by %s and by %s", p, other.Name, h.Name)
							return
						}
					}
					owner[p] = h
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	return func() { cancel(); <-done }
}

// converged waits until every host leads to the subnets of all others, and nowhere else,
// and checks that all books agree.
func (b *blockCrash) converged(t *testing.T) {
	t.Helper()
	seen := map[netip.Addr]string{}
	for _, h := range b.Agents {
		wait(t, h.Name+" to lead to all subnets of others", 60*time.Second, func() error {
			want := map[string]bool{}
			for _, other := range b.Agents {
				theirs, err := owned(other)
				if err != nil {
					return err
				}
				for _, p := range theirs {
					want[p.String()] = want[p.String()] || other != h
				}
			}
			out, err := h.Run(t.Context(), "ip", "-4", "route", "show", "dev", "vtep1024")
			if err != nil {
				return err
			}
			for line := range strings.Lines(out) {
				to := strings.Fields(line)[0]
				if strings.HasPrefix(to, "9.") && !want[to] {
					return fmt.Errorf("there is a way to %s: %s", to, line)
				}
				delete(want, to)
			}
			for to, others := range want {
				if others {
					return fmt.Errorf("there is no way to %s", to)
				}
			}
			return nil
		})
		checkStores(t, h)
		for _, a := range addressesOf(t, h) {
			if other := seen[a]; other != "" {
				t.Errorf("%s is given out on %s and on %s", a, other, h.Name)
			}
			seen[a] = h.Name
		}
	}
	t.Logf("%v: %d addresses are given out", time.Since(b.began).Round(time.Millisecond), len(seen))
}

// addressesOf are the addresses in a host's store. Each must be of a subnet of the host.
func addressesOf(t *testing.T, h *lab.Host) (out []netip.Addr) {
	t.Helper()
	text, err := h.Run(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "ipam", "show", "--run-dir", h.RunDir, "-o", "json")
	must(t, err)
	mine, err := owned(h)
	must(t, err)
	for _, word := range regexp.MustCompile(`"9\.\d+\.\d+\.\d+"`).FindAllString(text, -1) {
		a := netip.MustParseAddr(strings.Trim(word, `"`))
		if !slices.ContainsFunc(mine, func(p netip.Prefix) bool { return p.Contains(a) }) {
			t.Errorf("%s has %s, and its subnets are %v", h.Name, a, mine)
		}
		out = append(out, a)
	}
	return out
}

// plugins kills an ADD and a DEL at every step on a host whose first block is full, and
// ADDs that wait for a block.
func (b *blockCrash) plugins(t *testing.T) {
	h, ctx := b.Agents[1], t.Context()
	for i := range 5 {
		_, _, err := ipam(ctx, h, "ADD", "tight", "mesos", fmt.Sprint("full", i))
		must(t, err)
	}
	wait(t, "a further block", 60*time.Second, func() error {
		if blocks, err := blocksOf(h, "tight"); err != nil || len(blocks) == 0 {
			return fmt.Errorf("%v (%w)", blocks, err)
		}
		return nil
	})
	conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"tight","type":"m-overlay","runDir":%q}`, h.RunDir)
	run := func(bin, verb, id, netns, step string) (string, error) {
		cmd := h.Command(ctx, bin)
		cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + netns, "CNI_IFNAME=eth0", "CNI_PATH=" + h.Lab.Bin, "OVERLAY_CRASH=" + step}
		cmd.Stdin = strings.NewReader(conf)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	steps := map[string][]string{}
	for verb, files := range map[string][]string{"ADD": {"add.go", "kernel.go"}, "DEL": {"del.go"}} {
		for _, f := range files {
			source, err := os.ReadFile(filepath.Join(top, "plugins/internal/attach", f))
			must(t, err)
			for _, m := range regexp.MustCompile(`\tcrash\("(\w+)"\)`).FindAllStringSubmatch(string(source), -1) {
				steps[verb] = append(steps[verb], m[1])
			}
		}
	}
	real, killed := filepath.Join(h.Lab.Bin, "m-overlay"), 0
	for verb, points := range steps {
		for _, step := range points {
			id := verb + "-" + step
			ns, err := b.Netns(ctx, filepath.Base(h.Dir)+"-"+id)
			must(t, err)
			if verb == "DEL" {
				out, err := run(real, "ADD", id, ns.Path, "")
				if err != nil || !strings.Contains(out, `"9.0.`) {
					t.Fatalf("ADD: %v: %s", err, out)
				}
			}
			if out, err := run(b.plugin, verb, id, ns.Path, step); err == nil || err.Error() != "signal: killed" {
				t.Errorf("%s was to die at %s: %v %s", verb, step, err, out)
			}
			killed++
			if out, err := run(real, "DEL", id, ns.Path, ""); err != nil {
				t.Errorf("DEL after %s died at %s: %v %s", verb, step, err, out)
			}
			must(t, ns.Delete(ctx))
		}
	}
	if killed < 8 {
		t.Errorf("only %d steps", killed)
	}
	b.killWaiting(t, h)
	for i := range 5 {
		_, _, err := ipam(ctx, h, "DEL", "tight", "mesos", fmt.Sprint("full", i))
		must(t, err)
	}
	waitGivenBack(t, b.Seed, "tight")
	b.converged(t)
	for _, h := range b.Agents {
		if left := addressesOf(t, h); len(left) > 0 {
			t.Errorf("%s still has %v", h.Name, left)
		}
	}
}

// killWaiting kills ADDs, of which most wait for a block, one after the other.
func (b *blockCrash) killWaiting(t *testing.T, h *lab.Host) {
	const n = 16
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			limited, cancel := context.WithTimeout(t.Context(), time.Duration(i+1)*20*time.Millisecond)
			defer cancel()
			ipam(limited, h, "ADD", "tight", "docker", fmt.Sprint("w", i)) // killed, or in time
			if _, out, err := ipam(t.Context(), h, "DEL", "tight", "docker", fmt.Sprint("w", i)); err != nil {
				t.Errorf("DEL: %v: %s", err, out)
			}
		})
	}
	all.Wait()
}

// restartAll: the store and the files say the same as the programs that wrote them.
func (b *blockCrash) restartAll(t *testing.T) {
	ctx := t.Context()
	before := map[*lab.Host][]netip.Prefix{}
	for _, h := range b.Agents {
		var err error
		before[h], err = owned(h)
		must(t, err)
		h.Proc.Kill()
	}
	for _, c := range b.coordinators {
		c.Kill()
	}
	for _, c := range b.coordinators {
		must(t, c.Restart(ctx))
	}
	for _, h := range b.Agents {
		must(t, h.StartAgent(b.Coordinator.URL, b.agentArgs...))
	}
	for _, h := range b.Agents {
		must(t, h.WaitRegistered(ctx, b.Coordinator))
		if now, err := owned(h); err != nil || !slices.Equal(now, before[h]) {
			t.Errorf("%s has %v, before it had %v (%v)", h.Name, now, before[h], err)
		}
	}
	waitGivenBack(t, b.Seed, "tight")
	b.converged(t)
}
