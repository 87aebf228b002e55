package conformance

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// 1.5: CHECK.
var checkLines = []line{
	{id: "K01", level: "M", what: "compares with prevResult: missing is code 7, what is not in it or not there is an error", run: func(r *rig) {
		c := r.call()
		res := r.attach(c)
		r.refused(c.as("CHECK"), 7, "prevResult")
		r.refused(c.as("CHECK").set("prevResult", rawJSON("null")), 7, "prevResult")
		r.refused(c.as("CHECK").set("prevResult", edit(res, func(m map[string]any) { m["ips"] = []any{} })), 105, res.addr().String())
		if r.p.links {
			r.refused(c.as("CHECK").set("prevResult", edit(res, func(m map[string]any) { m["interfaces"] = []any{} })), 105, "eth0")
			r.refused(c.as("CHECK").set("prevResult", edit(res, func(m map[string]any) {
				m["ips"] = append(m["ips"].([]any), map[string]any{"address": "192.0.2.1/24", "interface": 1})
			})), 105, "192.0.2.1/24")
		}
	}},
	{id: "K02", level: "S", what: "interface, address, route or state that ADD made is gone: error, for each", not: ipamDoesNot(noLinks), run: func(r *rig) {
		for _, damage := range []struct{ how, word string }{
			{`ip -n "$1" addr del "$2/25" dev eth0`, "address"},
			{`ip -n "$1" route del default`, "route"},
			{`ip -n "$1" link set eth0 down`, "down"},
			{`ip -n "$1" link set eth0 down; ip -n "$1" link set eth0 name eth9`, "eth0 is missing"},
			{`ip -n "$1" link set eth0 mtu 9000`, "MTU"},
			{`ip -n "$1" link set eth0 address 0e:00:00:00:00:09`, "MAC"},
			{`ip link set "$3" nomaster`, "not a port"},
			{`ip link set "$3" down`, "down"},
			{`ip link del "$3"`, "missing"},
		} {
			c := r.call()
			res := r.attach(c)
			r.sh(r, damage.how, filepath.Base(c.netns), res.addr().String(), res.Interfaces[0].Name)
			r.refused(c.as("CHECK").set("prevResult", res.raw), 105, damage.word)
			r.ok(c.as("DEL"))
			r.gone(c)
		}
	}},
	{id: "K03", level: "M", what: "later changes that the chain made are fine: MAC as prevResult has it, smaller MTU, more addresses, more routes, routes in other tables", not: ipamDoesNot(noLinks), run: func(r *rig) {
		c := r.call()
		res := r.attach(c)
		r.sh(r, `ip -n "$1" link set eth0 address 0e:00:00:00:00:09; ip -n "$1" route add 198.51.100.0/24 dev eth0; ip -n "$1" addr add 192.0.2.1/24 dev eth0`, filepath.Base(c.netns))
		r.ok(c.as("CHECK").set("prevResult", edit(res, func(m map[string]any) {
			m["interfaces"].([]any)[1].(map[string]any)["mac"] = "0e:00:00:00:00:09"
			m["interfaces"] = append(m["interfaces"].([]any), map[string]any{"name": "ifb0"})
		})))
		// What tuning and sbr do, and do not mention in their results.
		for _, change := range []string{`ip -n "$1" link set eth0 mtu 1280`, `ip -n "$1" route del default; ip -n "$1" route add default via "$2" dev eth0 table 1000`} {
			c := r.call()
			res := r.attach(c)
			r.sh(r, change, filepath.Base(c.netns), res.IPs[0].Gateway.String())
			r.ok(c.as("CHECK").set("prevResult", res.raw))
		}
	}},
	{id: "K04", level: "S", what: "the reservation is missing, or of another address: error", run: func(r *rig) {
		c := r.call()
		res := r.attach(c)
		r.refused(c.as("CHECK").set("prevResult", edit(res, func(m map[string]any) {
			m["ips"].([]any)[0].(map[string]any)["address"] = r.free(90).String() + "/25"
		})), 105, res.addr().String())
		release := call{program: "overlay-ipam", command: "DEL", id: c.id, ifname: c.ifname, conf: map[string]any{"name": "v4", "runDir": r.dir}}
		r.ok(release)
		r.refused(c.as("CHECK").set("prevResult", res.raw), 105, "has no address")
	}},
	{id: "K05", level: "S", what: "bridge missing or down: error, code 11, because it passes; agent and coordinator away: no error",
		not: ipamDoesNot(noLinks), note: "the VTEP concerns the host and not one container: STATUS reports it", run: func(r *rig) {
			c := r.call()
			res := r.attach(c)
			check := c.as("CHECK").set("prevResult", res.raw)
			bridge := r.p.half[:1] + "-v4"
			resume := r.stopAgent(r)
			defer resume()
			r.ok(check)
			r.sh(r, `ip link set "$1" down`, bridge)
			r.refused(check, 11, bridge)
			resume()
			r.eventually("the agent to bring the bridge up", func() error {
				if out := r.host.run(r, check); out.status != 0 {
					return fmt.Errorf("CHECK: %s", out.stdout)
				}
				return nil
			})
		}},
	{id: "K06", level: "M", what: "succeeds at once after ADD", run: func(r *rig) {
		for _, net := range []string{"v4", "v6", "dual"} {
			r.net = net
			for _, v := range []string{"0.4.0", "1.0.0", "1.1.0"} {
				c := r.call().set("cniVersion", v)
				r.ok(c.as("CHECK").set("prevResult", r.parse(r.ok(c)).raw))
			}
		}
	}},
	{id: "K07", level: "S", what: "CHECK is run on the delegated IPAM plugin, its error forwarded", not: ipamDoesNot(noDelegate), run: func(r *rig) {
		c, dir := r.script(r.call(), "picky", fmt.Sprintf(
			`case $CNI_COMMAND in ADD) echo '{"cniVersion":"1.1.0","ips":[{"address":"%s/25"}]}';; CHECK) echo '{"cniVersion":"1.1.0","code":7,"msg":"not mine"}'; exit 1;; esac`, r.free(81)))
		res := r.attach(c)
		r.refused(c.as("CHECK").set("prevResult", res.raw), 7, "picky", "not mine")
		r.ok(c.as("DEL"))
		if got := r.calls(dir, "picky"); got != "ADD CHECK DEL" {
			r.Errorf("calls: %s", got)
		}
	}},
	{id: "K08", level: "X", what: "changes nothing", run: func(r *rig) {
		c := r.call()
		res := r.attach(c)
		before := r.storeBytes()
		r.unchanged(func() {
			r.ok(c.as("CHECK").set("prevResult", res.raw))
			r.refused(c.as("CHECK"), 7)
		}, c.netns)
		if r.storeBytes() != before {
			r.Error("the store's file changed")
		}
	}},
	{id: "K09", level: "X", what: "a prevResult about another namespace, or one that gives the address to another interface, is refused", not: ipamDoesNot(noLinks), run: func(r *rig) {
		c := r.call()
		res := r.attach(c)
		for word, change := range map[string]func(m map[string]any){
			"network namespace":  func(m map[string]any) { m["interfaces"].([]any)[1].(map[string]any)["sandbox"] = r.netns().Path },
			"does not give":      func(m map[string]any) { m["ips"].([]any)[0].(map[string]any)["interface"] = 0 },
			"lists 2 interfaces": func(m map[string]any) { m["ips"].([]any)[0].(map[string]any)["interface"] = 2 },
			res.addr().String():  func(m map[string]any) { m["ips"].([]any)[0].(map[string]any)["interface"] = -1 },
		} {
			r.refused(c.as("CHECK").set("prevResult", edit(res, change)), 105, word)
		}
		r.ok(c.as("CHECK").set("prevResult", res.raw))
	}},
}

// edit is a result, changed.
func edit(res result, change func(map[string]any)) map[string]any {
	b, _ := json.Marshal(res.raw)
	var m map[string]any
	_ = json.Unmarshal(b, &m)
	change(m)
	return m
}

func (r *rig) storeBytes() string {
	r.Helper()
	b, err := os.ReadFile(filepath.Join(r.dir, "ipam", r.net+".db"))
	must(r, err)
	return string(b)
}

// stopAgent stops the agent where it stands, until the function it returns is
// called.
func (h *host) stopAgent(t testing.TB) (resume func()) {
	t.Helper()
	must(t, syscall.Kill(h.Proc.Pid(), syscall.SIGSTOP))
	return func() { must(t, syscall.Kill(h.Proc.Pid(), syscall.SIGCONT)) }
}

// 1.6: STATUS.
var statusLines = []line{
	{id: "S01", level: "M", what: "0 if and only if ADD would be served; else an error document on stdout", run: func(r *rig) {
		r.ok(r.call().as("STATUS"))
		r.refused(r.call().as("STATUS").set("overlay", "unknown").set("ipam", map[string]any{"overlay": "unknown", "half": r.p.half, "runDir": r.dir}), 50, "unknown")
		// The address store, before and after it is there, is of the same opinion.
		r.onTmpfs()
		c := r.call()
		both := func(words string) {
			r.Helper()
			r.refused(c.as("STATUS"), 50, words)
			r.refused(c, 11, words)
		}
		r.sh(r, `mount -o remount,ro "$1"`, r.dir)
		both("read-only")
		r.sh(r, `mount -o remount,rw "$1"; dd if=/dev/zero of="$1/fill" bs=4k 2>/dev/null || true`, r.dir)
		both("no space left")
		r.sh(r, `rm "$1/fill"`, r.dir)
		r.ok(c.as("STATUS"))
		r.attach(c)
		c = r.call()
		r.sh(r, `mount -o remount,ro "$1"`, r.dir)
		both("read-only")
		r.sh(r, `mount -o remount,rw "$1"`, r.dir)
		r.ok(c.as("STATUS"))
	}},
	{id: "S02", level: "S", what: "50: nothing published, another boot, no overlay, exhausted; 51: VTEP or bridge missing, lease run out or lost",
		note: "a damaged store is rebuilt from the kernel and is no reason; overlay-ipam: bridge and VTEP are not its business", run: func(r *rig) {
			c := r.call().as("STATUS")
			if r.p.links {
				resume := r.stopAgent(r)
				r.sh(r, `ip link set vtep1024 down`)
				r.refused(c, 51, "vtep1024")
				r.sh(r, `ip link set vtep1024 up; ip link set "$1" down`, r.p.half[:1]+"-v4")
				r.refused(c, 51, r.p.half[:1]+"-v4")
				resume()
				r.eventually("the agent to repair the bridge", func() error {
					if out := r.host.run(r, c); out.status != 0 {
						return fmt.Errorf("STATUS: %s", out.stdout)
					}
					return nil
				})
			}
			r.forge(nil)
			c = r.call().as("STATUS")
			r.ok(c)
			must(r, os.Remove(filepath.Join(r.dir, "state.json")))
			r.refused(c, 50, "published")
			r.publish(func(s map[string]any) { s["boot_id"] = "other" })
			r.refused(c, 50, "reboot")
			r.publish(func(s map[string]any) { s["overlays"] = nil })
			r.refused(c, 50, "v4")
			must(r, os.WriteFile(filepath.Join(r.dir, "state.json"), []byte("{"), 0o644))
			r.refused(c, 50, "published state")
			r.publish(func(s map[string]any) { s["lease"].(map[string]any)["expires_boottime_ns"] = 1 })
			r.refused(c, 51)
			r.publish(func(s map[string]any) { s["lease"].(map[string]any)["lost"] = "gone" })
			r.refused(c, 51, "gone")
		}},
	{id: "S03", level: "M", what: "STATUS is run on the delegated IPAM plugin, its error forwarded", not: ipamDoesNot(noDelegate), run: func(r *rig) {
		c, dir := r.script(r.call(), "tired", `echo '{"cniVersion":"1.1.0","code":50,"msg":"tired"}'; exit 1`)
		r.refused(c.as("STATUS"), 50, "tired")
		if got := r.calls(dir, "tired"); got != "STATUS" {
			r.Errorf("calls: %s", got)
		}
	}},
	{id: "S04", level: "M", what: "ADD and DEL do not depend on STATUS, and run while it is an error", run: func(r *rig) {
		r.net = "tiny"
		c := r.call()
		r.attach(c)
		r.refused(c.as("STATUS"), 50)
		r.ok(c.as("DEL"))
		r.attach(c)
		r.refused(c.as("STATUS"), 50)
		r.ok(c.as("DEL"))
	}},
	{id: "S05", level: "X", what: "exhausted is 50; after DEL it is 0", note: "a resting address counts as available: ADD would use it early rather than fail", run: func(r *rig) {
		r.net = "tiny"
		c := r.call()
		r.ok(c.as("STATUS"))
		r.attach(c)
		r.refused(c.as("STATUS"), 50, "no address left")
		r.ok(c.as("DEL"))
		r.ok(c.as("STATUS"))
	}},
	{id: "S06", level: "X", what: "at most 1 s, and changes nothing", run: func(r *rig) {
		c := r.call()
		r.attach(c)
		before := r.storeBytes()
		r.unchanged(func() {
			if out := r.ok(c.as("STATUS")); out.took > time.Second {
				r.Errorf("took %s", out.took)
			}
		}, c.netns)
		if r.storeBytes() != before {
			r.Error("the store's file changed")
		}
	}},
}

// 1.7: GC. Containers are made as if 100 s ago, because younger ones are spared.
var gcLines = []line{
	{id: "G01", level: "S", what: "what is not listed is released; what is listed stays, whatever version it was added with", run: func(r *rig) {
		var keep []call
		for _, v := range versions {
			c := r.call().set("cniVersion", v).in(past(100)...)
			r.ok(c)
			keep = append(keep, c)
		}
		lost := r.call().in(past(100)...)
		r.attach(lost)
		r.ok(r.gc(keep...))
		r.gone(lost)
		for _, c := range keep {
			if len(r.holds(c)) != 1 {
				r.Errorf("%v was released", c.conf["cniVersion"])
			}
		}
		r.ok(r.gc())
		for _, c := range keep {
			r.gone(c)
		}
	}},
	{id: "G02", level: "X", what: "no list at all: code 7, nothing is released", run: func(r *rig) {
		c := r.call().in(past(100)...)
		r.attach(c)
		r.unchanged(func() {
			r.refused(r.call().as("GC"), 7, "cni.dev/valid-attachments")
			r.refused(r.call().as("GC").set("cni.dev/valid-attachments", rawJSON("null")), 7, "cni.dev/valid-attachments")
		})
	}},
	{id: "G03", level: "M", what: "an empty list: everything of this network and half goes, nothing else", run: func(r *rig) {
		mine := r.call().in(past(100)...)
		r.attach(mine)
		other := r.call().set("name", "other-net").set("overlay", "v4").in(past(100)...)
		r.attach(other)
		otherHalf := mine
		for _, p := range programs[:2] {
			if p.half != r.p.half {
				otherHalf = r.call().in(past(100)...)
				otherHalf.program = p.name
				otherHalf = otherHalf.set("type", p.name).set("ipam", map[string]any{"type": "overlay-ipam"}).set("runDir", r.dir)
				r.attach(otherHalf)
			}
		}
		r.ok(r.gc())
		r.gone(mine)
		for _, c := range []call{other, otherHalf} {
			if len(r.holds(c)) != 1 {
				r.Errorf("%s %v was released", c.program, c.conf["name"])
			}
		}
	}},
	{id: "G04", level: "X", what: "the older key cni.dev/attachments is accepted; both and different: code 7", run: func(r *rig) {
		keep, lost := r.call().in(past(100)...), r.call().in(past(100)...)
		r.attach(keep)
		r.attach(lost)
		list := valid(keep)
		r.unchanged(func() {
			r.refused(r.call().as("GC").set("cni.dev/attachments", list).set("cni.dev/valid-attachments", []any{}), 7, "differ")
		})
		r.ok(r.call().as("GC").set("cni.dev/attachments", list))
		r.gone(lost)
		r.ok(r.call().as("GC").set("cni.dev/attachments", list).set("cni.dev/valid-attachments", list))
		if len(r.holds(keep)) != 1 {
			r.Error("a listed one was released")
		}
	}},
	{id: "G05", level: "S", what: "errors do not stop the sweep and are reported", not: ipamDoesNot("releases all in one transaction"), run: func(r *rig) {
		c := r.call().in(past(100)...)
		r.attach(c)
		gc, dir := r.script(r.gc(), "broken", `echo '{"cniVersion":"1.1.0","code":11,"msg":"not now"}'; exit 1`)
		r.refused(gc, 11, "broken", "not now")
		r.gone(c)
		if got := r.calls(dir, "broken"); got != "GC" {
			r.Errorf("calls: %s", got)
		}
	}},
	{id: "G06", level: "M", what: "GC is run on the delegated plugin, with the list", not: ipamDoesNot(noDelegate), run: func(r *rig) {
		c, dir := r.script(r.gc(r.call()), "sweeper", "exit 0")
		r.ok(c)
		b, err := os.ReadFile(filepath.Join(dir, "sweeper.stdin"))
		must(r, err)
		if got := r.calls(dir, "sweeper"); got != "GC" || !strings.Contains(string(b), "cni.dev/valid-attachments") {
			r.Errorf("calls: %s, stdin %s", got, b)
		}
	}},
	{id: "G07", level: "X", what: "an attachment younger than 60 s is spared, listed or not", run: func(r *rig) {
		c := r.call()
		res := r.attach(c)
		old := r.call().in(past(61)...)
		r.attach(old)
		r.ok(r.gc())
		r.gone(old)
		r.ok(c.as("CHECK").set("prevResult", res.raw))
	}},
	{id: "G08", level: "X", what: "a list of 10,000 entries takes at most 2 s; unknown entries and duplicates are ignored", run: func(r *rig) {
		c := r.call().in(past(100)...)
		r.attach(c)
		list := append(valid(c), valid(c)...)
		for i := range 10000 {
			list = append(list, map[string]any{"containerID": fmt.Sprintf("unknown-%d", i/2), "ifname": "eth0"})
		}
		if out := r.ok(r.call().as("GC").set("cni.dev/valid-attachments", list)); out.took > 2*time.Second {
			r.Errorf("took %s", out.took)
		}
		if len(r.holds(c)) != 1 {
			r.Error("a listed one was released")
		}
	}},
	{id: "G09", level: "X", what: "released addresses rest", run: func(r *rig) {
		c := r.call().in(past(100)...)
		r.attach(c)
		before := r.use(r, r.net, r.p.half)
		r.ok(r.gc())
		if after := r.use(r, r.net, r.p.half); after.Cooling != before.Cooling+1 || after.Used != before.Used-1 {
			r.Errorf("before %+v, after %+v", before, after)
		}
	}},
	{id: "G10", level: "M", what: "nothing on stdout on success", run: func(r *rig) {
		c := r.call().in(past(100)...)
		r.attach(c)
		if out := r.ok(r.gc()); out.stdout != "" {
			r.Errorf("GC printed %q", out.stdout)
		}
	}},
}

// gc is a GC that lists these containers as valid.
func (r *rig) gc(keep ...call) call {
	return r.call().as("GC").set("cni.dev/valid-attachments", valid(keep...))
}

func valid(keep ...call) []any {
	list := []any{}
	for _, c := range keep {
		list = append(list, map[string]any{"containerID": c.id, "ifname": c.ifname})
	}
	return list
}
