package conformance

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A followUp is what happens after a program was killed.
type followUp struct {
	name string
	do   func(r *rig, c call)
}

// followUps leave nothing of the container behind, whatever the program had done
// before it was killed. A reboot is the last of them; see TestCrashSweep.
var followUps = []followUp{
	{"DEL", func(r *rig, c call) { r.ok(c.as("DEL")) }},
	{"DEL without netns", func(r *rig, c call) { r.ok(c.as("DEL").without("CNI_NETNS")) }},
	{"DEL with netns gone", func(r *rig, c call) {
		must(r, namespace(c.netns).Delete(r.Context()))
		r.ok(c.as("DEL"))
	}},
	{"GC", func(r *rig, c call) { r.ok(r.gc()) }},
	{"ADD again", func(r *rig, c call) {
		// It works, or the interface is there and the runtime is told so. Either
		// way the books have to agree before DEL.
		if out := r.run(c); out.status == 0 {
			r.ok(c.as("CHECK").set("prevResult", r.parse(out).raw))
		} else if f := out.failure(r); f.Code != 103 {
			r.Errorf("ADD again: %d %s", f.Code, f.Msg)
		}
		if d := r.check(r); d != "" {
			r.Errorf("after ADD again:\n%s", d)
		}
		r.ok(c.as("DEL"))
	}},
}

// killAt runs a verb of a program that dies at a step, on a container attached
// 100 s ago.
func (r *rig) killAt(verb, point string) call {
	r.Helper()
	c := r.call()
	dying := c.as(verb).with("OVERLAY_CRASH=" + point)
	dying.bin = crashDir
	if verb == "ADD" {
		dying = dying.in(past(100)...)
	} else {
		r.attach(c.in(past(100)...))
	}
	if out := r.run(dying); out.status != -1 {
		r.Fatalf("%s was to die at %s: exit %d %s%s", verb, point, out.status, out.stdout, out.stderr)
	}
	return c
}

// TestCrashSweep kills ADD and DEL at every step and follows up in every way.
func TestCrashSweep(t *testing.T) {
	h := newHost(t)
	combinations, clean := 0, 0
	var beforeReboot []call
	sweep := func(p program, net, verb, point string) {
		for _, f := range followUps {
			combinations++
			if t.Run(strings.Join([]string{p.name, net, verb, point, f.name}, "/"), func(t *testing.T) {
				r := newRig(t, h, p)
				r.net = net
				c := r.killAt(verb, point)
				f.do(r, c)
				r.gone(c)
				delete(r.ids, c.id+"/eth0/"+net) // cleanUp would hide what is left
			}) {
				clean++
			}
		}
	}
	for _, p := range programs[:2] {
		for _, net := range []string{"v4", "dual"} {
			for verb, points := range map[string][]string{"ADD": addPoints, "DEL": delPoints} {
				for _, point := range points {
					sweep(p, net, verb, point)
				}
			}
		}
	}
	// One reboot serves for all combinations with it: everything that was killed
	// in the old boot has to be gone in the new one.
	combinations++
	if t.Run("reboot", func(t *testing.T) {
		r := newRig(t, h, programs[0])
		for _, p := range programs[:2] {
			r.p = p
			for _, net := range []string{"v4", "dual"} {
				r.net = net
				for _, point := range addPoints {
					beforeReboot = append(beforeReboot, r.killAt("ADD", point))
				}
				for _, point := range delPoints {
					beforeReboot = append(beforeReboot, r.killAt("DEL", point))
				}
			}
		}
		combinations += len(beforeReboot) - 1
		h.reboot(t, beforeReboot)
		clear(r.ids)
		for _, c := range beforeReboot {
			if a := r.holds(c); len(a) > 0 {
				t.Errorf("survived the reboot: %v", a)
			}
		}
		if d := h.check(t); d != "" {
			t.Errorf("overlayctl ipam check after the reboot:\n%s", d)
		}
	}) {
		clean += len(beforeReboot)
	}
	t.Logf("%d combinations of program, addresses, step and follow-up; overlayctl ipam check is clean in %d", combinations, clean)
	if combinations < 120 {
		t.Errorf("only %d combinations", combinations)
	}
}

// reboot takes the containers' namespaces away, gives the host another boot id
// and starts the agent again.
func (h *host) reboot(t testing.TB, containers []call) {
	t.Helper()
	h.Proc.Kill()
	for _, c := range containers {
		must(t, namespace(c.netns).Delete(t.Context()))
	}
	n := h.ids.Add(1)
	must(t, os.WriteFile(h.bootFile, fmt.Appendf(nil, "%08x-2222-4222-8222-222222222222\n", n), 0o644))
	h.startAgent(t)
}

// TestStraceSweep kills ADD at one system call after the other, from outside.
func TestStraceSweep(t *testing.T) {
	h := newHost(t)
	// What an ADD does to the world, and what it asks of it.
	calls := strings.Fields("openat socket bind sendto sendmsg recvfrom fcntl flock pwrite64 fdatasync ftruncate fallocate fchmod renameat unlinkat mkdirat setns write close")
	const most = 40 // of one kind
	for _, p := range programs[1:] {
		for _, fresh := range []bool{false, true} {
			name := p.name
			if fresh {
				name += " first of a boot"
			}
			t.Run(name, func(t *testing.T) {
				r := newRig(t, h, p)
				if !fresh {
					c := r.call()
					r.ok(c) // the store is there
					r.ok(c.as("DEL"))
				}
				killed := 0
				for _, name := range calls {
					// Calls are counted for each thread, so that a number may be reached in
					// one run and not in another.
					for n, through := 1, 0; n <= most && through < 2; n++ {
						if fresh {
							r.forge(nil)
						}
						if r.killedAtCall(name, n) {
							killed, through = killed+1, 0
						} else {
							through++
						}
					}
				}
				t.Logf("killed at %d system calls", killed)
				if killed < 30 {
					t.Errorf("only %d of them were reached", killed)
				}
			})
		}
	}
}

// killedAtCall kills an ADD at its nth system call of a kind, and checks that
// DEL cleans up. It reports whether there were so many.
func (r *rig) killedAtCall(name string, n int) bool {
	r.Helper()
	c := r.call()
	out := r.host.run(r, c.in("strace", "-f", "-qqq", "-o", "/dev/null", "-e", "trace="+name, "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", name, n)))
	r.ok(c.as("DEL"))
	r.gone(c)
	if d := r.checkIn(r, r.dir); d != "" {
		r.Errorf("killed at %s %d: overlayctl ipam check:\n%s", name, n, d)
	}
	r.recycle()
	return out.status != 0
}

// TestLostAnswers: the kernel has done what it was asked for, and ADD does not get
// to know, one answer after the other. What an ADD that fails may have made is
// taken back by itself.
func TestLostAnswers(t *testing.T) {
	h := newHost(t)
	for _, p := range programs {
		if !p.links {
			continue
		}
		t.Run(p.name, func(t *testing.T) {
			r := newRig(t, h, p)
			r.net = "dual"
			lost, tries, trace := 0, 0, filepath.Join(t.TempDir(), "trace")
			for n, through := 1, 0; through < 3; n++ {
				c := r.call()
				out := r.host.run(r, c.in("strace", "-f", "-qqq", "-o", trace, "-e", "trace=recvfrom", "-e", fmt.Sprintf("inject=recvfrom:error=ENOBUFS:when=%d", n)))
				// strace counts for each thread, and the program may go on in another one:
				// then further answers are lost, of taking back too, and DEL has to do it.
				told, err := os.ReadFile(trace)
				must(r, err)
				if bytes.Count(told, []byte("(INJECTED)")) > 1 && tries < 50 {
					tries++
					n--
					r.ok(c.as("DEL"))
					r.gone(c)
					r.recycle()
					continue
				}
				if out.status == 0 {
					through++
					r.ok(c.as("DEL"))
				} else {
					lost, through = lost+1, 0
				}
				r.gone(c)
				if d := r.checkIn(r, r.dir); d != "" {
					r.Errorf("answer %d lost: %s\noverlayctl ipam check:\n%s", n, out.stdout, d)
				}
				r.ok(c.as("DEL"))
				r.recycle()
			}
			if lost < 5 {
				t.Errorf("only %d answers were lost", lost)
			}
		})
	}
}

// recycle gives the namespaces of containers that are gone to those to come.
func (r *rig) recycle() {
	for _, n := range r.namespaces {
		busy := false
		for _, c := range r.ids {
			busy = busy || c.netns == n.Path
		}
		if !busy {
			r.freeNetns(r, n)
		}
	}
	r.namespaces = nil
	for _, c := range r.ids {
		r.namespaces = append(r.namespaces, namespace(c.netns))
	}
}
