package conformance

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// counts is what must be the same before and after: nothing may leak.
type counts struct {
	links, addresses, routes, fdb, records, mounts int
	agentFiles, coordinatorFiles, ownFiles         int
	stores                                         int64 // bytes
}

func (h *host) count(t testing.TB) counts {
	t.Helper()
	lines := func(script string) int { return strings.Count(h.sh(t, script), "\n") }
	files := func(pid int) int {
		n, conns := openFiles(t, pid)
		// An agent keeps its stream and up to four connections that wait for the
		// next request: how many depends on what met, not on what leaked.
		if conns > 2*(1+4) {
			t.Errorf("process %d has %d TCP connections", pid, conns)
		}
		return n
	}
	c := counts{
		links: lines("ip -o link"), addresses: lines("ip -o addr"),
		// A bridge gets its link-local address when its first port comes up.
		routes: lines("{ ip route show table all; ip -6 route show table all; } | grep -v fe80:"),
		fdb:    lines("bridge fdb | grep -v self"),
		// Those of the rest of the machine come and go as they like.
		mounts:     lines("grep -F " + h.Lab.Name + " /proc/self/mountinfo"),
		agentFiles: files(h.Proc.Pid()), coordinatorFiles: files(h.coordinator.Pid()), ownFiles: files(os.Getpid()),
	}
	attachments, _ := h.list(t, h.RunDir)
	c.records = len(attachments)
	stores, err := filepath.Glob(filepath.Join(h.RunDir, "ipam", "*.db"))
	must(t, err)
	for _, s := range stores {
		st, err := os.Stat(s)
		must(t, err)
		c.stores += st.Size()
	}
	return c
}

// openFiles counts a process's open files, connections over TCP apart.
func openFiles(t testing.TB, pid int) (files, conns int) {
	t.Helper()
	tcp := map[string]bool{}
	for _, family := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, family))
		must(t, err)
		for line := range strings.Lines(string(b)) {
			const listen, state, inode = "0A", 3, 9
			if f := strings.Fields(line); len(f) > inode && f[state] != listen {
				tcp["socket:["+f[inode]+"]"] = true
			}
		}
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		if to, _ := os.Readlink(filepath.Join(dir, e.Name())); tcp[to] {
			conns++
		} else {
			files++
		}
	}
	return files, conns
}

// TestSoak attaches and detaches containers in their namespaces, 50 at a time:
// 10,000 with -full.
func TestSoak(t *testing.T) {
	h := newHost(t)
	total, workers := 1000, 50
	if *full {
		total = 10000
	}
	r := newRig(t, h, programs[0])
	calls := make([]call, workers)
	for i := range calls {
		p := programs[i%2]
		calls[i] = r.call()
		calls[i].program = p.name
		calls[i] = calls[i].set("type", p.name)
	}
	var (
		held sync.Map // address -> container
		done atomic.Int64
		n    atomic.Int64
	)
	fill := func(rounds int64) time.Duration {
		n.Store(0)
		start := time.Now()
		var wg sync.WaitGroup
		for i := range workers {
			wg.Go(func() {
				for n.Add(1) <= rounds && !t.Failed() {
					c := calls[i]
					c.id = fmt.Sprintf("soak-%d", done.Add(1))
					out := h.run(t, c)
					if out.status != 0 {
						t.Errorf("ADD: %q %s", out.stdout, out.stderr)
						return
					}
					var res result
					if err := unmarshal(out.stdout, &res); err != nil || len(res.IPs) != 1 {
						t.Errorf("result: %v %s", err, out.stdout)
						return
					}
					if other, twice := held.LoadOrStore(res.addr(), c.id); twice {
						t.Errorf("%s was given to %s and %v", res.addr(), c.id, other)
					}
					held.Delete(res.addr())
					if out := h.run(t, c.as("DEL")); out.status != 0 {
						t.Errorf("DEL: %s%s", out.stdout, out.stderr)
					}
				}
			})
		}
		wg.Wait()
		return time.Since(start)
	}
	fill(300) // every address of both halves has been used, the stores have grown
	before := h.settled(t, counts{})
	took := fill(int64(total))
	after := h.settled(t, before)
	if after != before {
		t.Errorf("before and after %d containers: %+v, %+v", total, before, after)
	}
	t.Logf("%d containers attached and detached, %d at a time, in %s: %.0f a second; nothing left", total, workers, took.Round(time.Millisecond), float64(total)/took.Seconds())
	if *full {
		h.waitSwept(t)
	}
}

// waitSwept leaves containers behind without a DEL and waits for the agent to
// release what they had, and nothing else. It takes one to two minutes.
func (h *host) waitSwept(t *testing.T) {
	t.Helper()
	var lost []call
	for _, p := range programs {
		r := newRig(t, h, p)
		c := r.call()
		if p.links {
			c = c.with("OVERLAY_CRASH=reserved") // an address, and never an interface
			c.bin = crashDir
		}
		r.run(c)
		clear(r.ids)
		must(t, namespace(c.netns).Delete(t.Context()))
		lost = append(lost, c)
	}
	r := newRig(t, h, programs[2])
	living := r.call()
	r.ok(living)
	start := time.Now()
	must(t, lab.Wait(t.Context(), "the agent to release what lost containers had", 3*time.Minute, func() error {
		left, _ := h.list(t, h.RunDir)
		for _, a := range left {
			for _, c := range lost {
				if a.ContainerID == c.id {
					return fmt.Errorf("%s still has %v", a.ContainerID, a.Addrs)
				}
			}
		}
		return nil
	}))
	if took := time.Since(start); took < time.Minute {
		t.Errorf("released after %s", took)
	}
	if len(r.holds(living)) != 1 {
		t.Error("a living container's address was released")
	}
	t.Logf("what %d lost containers had was released after %s", len(lost), time.Since(start).Round(time.Second))
}

// settled counts until the counts are those wanted, or for a while: the kernel
// takes its time to forget.
func (h *host) settled(t testing.TB, want counts) counts {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	last := h.count(t)
	for same := 0; time.Now().Before(deadline); {
		now := h.count(t)
		if now == want {
			return now
		}
		if now == last {
			same++
		} else {
			same, last = 0, now
		}
		if want == (counts{}) && same >= 3 {
			break
		}
	}
	return last
}

// TestDrain fills a /25 half to the last address and drains it, 20 times.
func TestDrain(t *testing.T) {
	h := newHost(t)
	r := newRig(t, h, programs[2])
	const half, rounds, workers = 125, 20, 4
	base := r.call()
	base.netns = "/run/netns/none"
	each := func(verb string, n int, f func(i int, out outcome)) {
		var next atomic.Int64
		var wg sync.WaitGroup
		for range workers {
			wg.Go(func() {
				for i := int(next.Add(1)); i <= n; i = int(next.Add(1)) {
					c := base.as(verb)
					c.id = fmt.Sprintf("drain-%d", i)
					out := h.run(t, c)
					if out.status != 0 {
						t.Errorf("%s %d: %s%s", verb, i, out.stdout, out.stderr)
					}
					f(i, out)
				}
			})
		}
		wg.Wait()
	}
	refusal := `{
    "cniVersion": "1.1.0",
    "code": 11,
    "msg": "overlay v4: no address left in the docker half 9.0.0.128/25: 125 used, 0 cooling, 125 in all; remove containers or give the overlay a shorter prefix"
}
`
	for round := range rounds {
		var mu sync.Mutex
		got := map[netip.Addr]int{}
		each("ADD", half, func(i int, out outcome) {
			var res result
			if err := unmarshal(out.stdout, &res); err != nil || len(res.IPs) != 1 {
				t.Errorf("result: %v %s", err, out.stdout)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if other, twice := got[res.addr()]; twice {
				t.Errorf("%s was given to %d and %d", res.addr(), other, i)
			}
			got[res.addr()] = i
		})
		for n := byte(130); n <= 254; n++ {
			if _, ok := got[netip.AddrFrom4([4]byte{9, 0, 0, n})]; !ok {
				t.Errorf("9.0.0.%d was not given", n)
			}
		}
		last := base
		last.id = "one-too-many"
		if out := h.run(t, last); out.status != 1 || out.stdout != refusal {
			t.Errorf("round %d: exit %d and\n%s\nwant 1 and\n%s", round, out.status, out.stdout, refusal)
		}
		each("DEL", half, func(int, outcome) {})
		if u := h.use(t, "v4", "docker"); u.Used != 0 || u.Cooling != half {
			t.Errorf("round %d: after draining %+v", round, u)
		}
		if t.Failed() {
			return
		}
	}
}
