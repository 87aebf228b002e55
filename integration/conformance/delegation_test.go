package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// 1.8: IPAM as a delegated plugin, and delegation.
var ipamLines = []line{
	{id: "I01", level: "M", what: "the result has ips, gateway, routes and dns, no interfaces and no index", not: onlyIPAM, run: func(r *rig) {
		for _, net := range []string{"v4", "v6", "dual"} {
			r.net = net
			res := r.attach(r.call())
			if _, ok := res.raw["interfaces"]; ok {
				r.Errorf("interfaces in %v", res.raw)
			}
			for _, ip := range res.IPs {
				if ip.Interface != nil || !ip.Gateway.IsValid() {
					r.Errorf("%+v", ip)
				}
			}
			if len(res.Routes) != len(res.IPs) {
				r.Errorf("routes %v", res.Routes)
			}
		}
	}},
	{id: "I02", level: "M", what: "takes a main plugin's whole configuration and environment; touches no link, route or namespace", not: onlyIPAM, run: func(r *rig) {
		c := r.call().set("bridge", "cni0").set("isGateway", true).set("ipMasq", true).set("prevResult", map[string]any{"cniVersion": "1.1.0"})
		before := r.kernel(r, r.Path) + r.kernel(r, c.netns)
		trace := r.trace(c, "setns,socket")
		r.ids[c.id] = c
		if after := r.kernel(r, r.Path) + r.kernel(r, c.netns); after != before {
			r.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
		if strings.Contains(trace, "setns") {
			r.Errorf("enters a namespace:\n%s", trace)
		}
	}},
	{id: "I03", level: "S", what: "DEL releases with the namespace gone, the configuration broken, the agent down (D03 to D13)", not: onlyIPAM, run: func(r *rig) {
		c := r.call()
		r.attach(c)
		c.netns = "/run/netns/none"
		resume := r.stopAgent(r)
		defer resume()
		r.ok(c.as("DEL").set("bridge", 5).set("dns", "x").set("prevResult", 5))
		r.gone(c)
	}},
	{id: "I04", level: "X", what: "CHECK compares owner and address with prevResult", not: onlyIPAM, run: func(r *rig) {
		c := r.call()
		res := r.attach(c)
		r.ok(c.as("CHECK").set("prevResult", res.raw))
		other := r.call()
		r.refused(other.as("CHECK").set("prevResult", res.raw), 105, other.id)
		not := "9.0.0.250/25"
		if res.addr().String() == "9.0.0.250" { // it may be its turn
			not = "9.0.0.249/25"
		}
		r.refused(c.as("CHECK").set("prevResult", edit(res, func(m map[string]any) { m["ips"].([]any)[0].(map[string]any)["address"] = not })), 105, res.addr().String())
	}},
	{id: "I05", level: "X", what: "works alone, without an upper plugin, and under the reference plugins bridge and ptp", not: onlyIPAM,
		note: "alone: the whole column overlay-ipam", run: func(r *rig) {
			const reference = "/usr/lib/cni"
			for _, plugin := range []string{"bridge", "ptp"} {
				if _, err := os.Stat(filepath.Join(reference, plugin)); err != nil {
					r.Skipf("%s: install containernetworking-plugins", err)
				}
				c := r.call().set("type", plugin).set("cniVersion", "1.0.0").set("bridge", "ref0")
				c.program, c.bin, c.path = plugin, reference, reference+":"+binDir
				if res := r.attach(c); !strings.HasPrefix(res.addr().String(), "9.0.0.") {
					r.Errorf("%s got %s", plugin, res.addr())
				}
				r.ok(c.as("DEL"))
				r.gone(c)
				delete(r.ids, c.id+"/eth0/v4")
			}
			r.sh(r, `ip link del ref0`)
		}},
}

var delegationLines = []line{
	{id: "L01", level: "S", what: "a delegate is found through CNI_PATH in order; a name with '/' is refused; what is no regular file is passed over", not: ipamDoesNot(noDelegate), run: func(r *rig) {
		c, first := r.script(r.call(), "which", "exit 3")
		second := r.TempDir()
		must(r, os.WriteFile(filepath.Join(second, "which"), []byte("#!/bin/sh\nexit 4\n"), 0o755))
		odd := r.TempDir()
		must(r, os.Mkdir(filepath.Join(odd, "which"), 0o755))
		c.path = odd + ":" + first + ":" + second
		r.refused(c, 106, "exit status 3")
		c.path = odd + ":" + second + ":" + first
		r.refused(c, 106, "exit status 4")
		c.path = odd
		r.refused(c, 106, "which", "CNI_PATH")
		for _, bad := range []string{"../which", first + "/which", "a/b", "..", "."} {
			r.refused(c.set("ipam", map[string]any{"type": bad}), 7, "name of a program")
		}
	}},
	{id: "L02", level: "S", what: "a delegate gets the same environment and byte for byte the same stdin", not: ipamDoesNot(noDelegate), run: func(r *rig) {
		stdin := fmt.Sprintf("{ \"cniVersion\":\"1.1.0\",\n\t\"name\":\"v4\", \"runDir\":%q,\n \"x\":[1.0,1e3,\"\\u00e4<&>\"], \"ipam\":{\"type\":\"same\"} }\n", r.dir)
		c, dir := r.script(r.call(), "same", "exit 3")
		r.refused(c.text(stdin).with("CNI_ARGS=A=b", "EXTRA=1"), 106)
		got, err := os.ReadFile(filepath.Join(dir, "same.stdin"))
		must(r, err)
		if string(got) != stdin {
			r.Errorf("stdin %q, want %q", got, stdin)
		}
		env, err := os.ReadFile(filepath.Join(dir, "same.env"))
		must(r, err)
		for _, v := range c.with("CNI_ARGS=A=b", "EXTRA=1").environment() {
			if strings.HasPrefix(v, "CNI_COMMAND=") {
				v = "CNI_COMMAND=DEL" // the last call
			}
			if !strings.Contains(string(env), v+"\n") {
				r.Errorf("%s is not in its environment:\n%s", v, env)
			}
		}
	}},
	{id: "L03", level: "S", what: "a delegate's stderr is passed on", not: ipamDoesNot(noDelegate), run: func(r *rig) {
		c, _ := r.script(r.call(), "noisy", "echo what I always wanted to say >&2; exit 3")
		if out := r.run(c); !strings.Contains(out.stderr, "what I always wanted to say") {
			r.Errorf("stderr %q", out.stderr)
		}
	}},
	{id: "L04", level: "M", what: "DEL, CHECK, GC and STATUS are run on delegates", not: ipamDoesNot(noDelegate), run: func(r *rig) {
		c, dir := r.script(r.call(), "all", fmt.Sprintf(`[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.1.0","ips":[{"address":"%s/25"}]}'`, r.free(82)))
		res := r.attach(c)
		r.ok(c.as("CHECK").set("prevResult", res.raw))
		r.ok(c.as("STATUS"))
		r.ok(c.as("GC").set("cni.dev/valid-attachments", valid(c)))
		r.ok(c.as("DEL"))
		if got := r.calls(dir, "all"); got != "ADD CHECK STATUS GC DEL" {
			r.Errorf("calls: %s", got)
		}
	}},
	{id: "L06", level: "X", what: "an IPAM plugin that is none, or leads back to us, is code 7 at once; DEL succeeds", not: ipamDoesNot(noDelegate), run: func(r *rig) {
		again, _ := r.script(r.call(), "again", fmt.Sprintf(`exec %s/%s <"$0.stdin"`, binDir, r.p.name))
		for _, c := range []call{again, r.call().set("ipam", map[string]any{"type": r.p.name}), r.call().set("ipam", map[string]any{"type": "bridge"})} {
			start := time.Now()
			r.refused(c, 7, "ipam.type")
			r.ok(c.as("DEL"))
			r.gone(c)
			if took := time.Since(start); took > 5*time.Second {
				r.Errorf("took %s", took)
			}
		}
	}},
	{id: "L05", level: "X", slow: true, what: "a delegate hangs, prints 100 MB, null, garbage or nothing, dies by a signal: bounded error, its DEL is run, nothing is left",
		not: ipamDoesNot(noDelegate), run: func(r *rig) {
			var wg sync.WaitGroup
			for name, body := range map[string]string{
				"hangs":   `[ $CNI_COMMAND != ADD ] || sleep 60`,
				"prints":  `[ $CNI_COMMAND != ADD ] || head -c 100000000 /dev/zero`,
				"null":    `[ $CNI_COMMAND != ADD ] || echo null`,
				"garbage": `[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.1.0"}{'`,
				"nothing": `exit 0`,
				"killed":  `[ $CNI_COMMAND != ADD ] || kill -9 $$`,
				"noips":   `[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.1.0","ips":[]}'`,
				"child":   `[ $CNI_COMMAND != ADD ] || { sleep 60 & echo nonsense; }`,
			} {
				c, dir := r.script(r.call(), name, body)
				wg.Go(func() {
					out := r.host.run(r, c)
					if out.status != 1 || out.took > 13*time.Second {
						r.Errorf("%s: exit %d after %s: %s", name, out.status, out.took, out.stdout)
						return
					}
					if f := out.failure(r); f.Code != 106 && f.Code != 11 || !strings.Contains(f.Msg, name) {
						r.Errorf("%s: %d %s", name, f.Code, f.Msg)
					}
					if got := r.calls(dir, name); got != "ADD DEL" {
						r.Errorf("%s: calls %s", name, got)
					}
					r.gone(c)
				})
			}
			wg.Wait()
		}},
}
