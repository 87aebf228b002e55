package conformance

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// 1.3: ADD.
var addLines = []line{
	{id: "A01", level: "M/S", what: "makes an interface named CNI_IFNAME in CNI_NETNS, or fails", not: ipamDoesNot(noLinks), run: func(r *rig) {
		for _, name := range []string{"eth0", "net1", "a", "lo0.5_-x"} {
			c := r.call()
			c.ifname = name
			r.attach(c)
			if links := r.linksIn(c.netns); !slices.Equal(links, []string{"lo", name}) {
				r.Errorf("links: %q", links)
			}
		}
		c := r.call()
		c.ifname = "lo" // taken
		r.refused(c, 103, "lo")
	}},
	{id: "A02", level: "M", what: "an interface of that name exists: error, it is untouched, no address is used", not: ipamDoesNot(noLinks), run: func(r *rig) {
		c := r.call()
		r.sh(r, `ip -n "$1" link add eth0 type bridge; ip -n "$1" addr add 192.0.2.1/24 dev eth0`, filepath.Base(c.netns))
		r.unchanged(func() { r.refused(c, 103, "eth0") }, c.netns)
		r.sh(r, `ip -n "$1" link del eth0`, filepath.Base(c.netns))
	}},
	{id: "A03", level: "M", what: "the result has the configuration's cniVersion", run: func(r *rig) {
		for _, v := range versions {
			if got := r.attach(r.call().set("cniVersion", v)).CNIVersion; got != v {
				r.Errorf("%s for %s", got, v)
			}
		}
	}},
	{id: "A04", level: "M", what: "interfaces list both ends; sandbox is CNI_NETNS verbatim inside and empty on the host", not: ipamDoesNot(noLinks), run: func(r *rig) {
		c := r.call()
		c.netns = "/run/../run/netns//" + filepath.Base(c.netns)
		res := r.attach(c)
		if len(res.Interfaces) != 2 || res.Interfaces[0].Sandbox != "" || res.Interfaces[1].Sandbox != c.netns || res.Interfaces[1].Name != "eth0" {
			r.Errorf("interfaces: %+v", res.Interfaces)
		}
	}},
	{id: "A05", level: "M", what: "addresses have the half's mask, a gateway in it and, with interfaces, the index of the container's", run: func(r *rig) {
		for _, net := range []string{"v4", "v6", "dual"} {
			r.net = net
			res := r.attach(r.call())
			for _, ip := range res.IPs {
				if !ip.Address.Masked().Contains(ip.Gateway) || ip.Gateway == ip.Address.Addr() || ip.Address.Bits() != map[bool]int{true: 25, false: 81}[ip.Gateway.Is4()] {
					r.Errorf("%+v", ip)
				}
				if r.p.links && (ip.Interface == nil || res.Interfaces[*ip.Interface].Sandbox == "") {
					r.Errorf("%s is of no interface in the container", ip.Address)
				}
			}
			if want := map[string]int{"v4": 1, "v6": 1, "dual": 2}[net]; len(res.IPs) != want {
				r.Errorf("%s: %d addresses, want %d", net, len(res.IPs), want)
			}
		}
	}},
	{id: "A06", level: "X", what: "name, MAC, MTU, addresses and routes in the result are those in the kernel", not: ipamDoesNot(noLinks), run: func(r *rig) {
		for _, net := range []string{"v4", "v6", "dual"} {
			r.net = net
			c := r.call()
			res := r.attach(c)
			inside := r.sh(r, `ip -n "$1" -d -o link show eth0; ip -n "$1" -o addr show eth0; ip -n "$1" route; ip -n "$1" -6 route`, filepath.Base(c.netns))
			outside := r.sh(r, `ip -d -o link show "$1"`, res.Interfaces[0].Name)
			has := func(text string, words ...string) {
				for _, w := range words {
					if !strings.Contains(text, w) {
						r.Errorf("the kernel does not say %q:\n%s", w, text)
					}
				}
			}
			has(inside, "link/ether "+res.Interfaces[1].Mac, fmt.Sprintf("mtu %d ", res.Interfaces[1].Mtu))
			has(outside, "link/ether "+res.Interfaces[0].Mac, fmt.Sprintf("mtu %d ", res.Interfaces[0].Mtu), "master "+r.p.half[:1]+"-"+net, "state UP")
			for _, ip := range res.IPs {
				has(inside, " "+ip.Address.String()+" ")
			}
			for _, route := range res.Routes {
				has(inside, "default via "+route.GW.String()+" dev eth0")
				if route.Dst.Bits() != 0 {
					r.Errorf("route %v", route)
				}
			}
			if len(res.Routes) != len(res.IPs) {
				r.Errorf("routes %v for %v", res.Routes, res.IPs)
			}
		}
	}},
	{id: "A07", level: "M", what: "prevResult is passed through, ours added to it", not: ipamDoesNot("is never in a chain: the main plugin's prevResult is not its own"), run: func(r *rig) {
		c := r.call().set("prevResult", map[string]any{
			"cniVersion": "1.1.0", "dns": map[string]any{"nameservers": []any{"192.0.2.53"}},
			"interfaces": []any{map[string]any{"name": "other0", "mac": "02:00:00:00:00:01", "sandbox": "/x"}},
			"ips":        []any{map[string]any{"address": "192.0.2.9/24", "interface": 0}},
			"routes":     []any{map[string]any{"dst": "198.51.100.0/24", "gw": "192.0.2.1"}},
		})
		res := r.attach(c)
		if len(res.Interfaces) != 3 || res.Interfaces[0].Name != "other0" || len(res.IPs) != 2 || res.IPs[0].Address.String() != "192.0.2.9/24" ||
			*res.IPs[1].Interface != 2 || len(res.Routes) != 2 || !strings.Contains(fmt.Sprint(res.raw["dns"]), "192.0.2.53") {
			r.Errorf("result: %v", res.raw)
		}
	}},
	{id: "A08", level: "S", what: "the delegated IPAM plugin's ADD fails: its DEL is run before returning", not: ipamDoesNot(noDelegate), run: func(r *rig) {
		c, dir := r.script(r.call(), "failing", `[ $CNI_COMMAND != ADD ] || { echo '{"cniVersion":"1.1.0","code":11,"msg":"no luck today"}'; exit 1; }`)
		r.refused(c, 11, "failing", "no luck today")
		if got := r.calls(dir, "failing"); got != "ADD DEL" {
			r.Errorf("calls: %s", got)
		}
		r.gone(c)
	}},
	{id: "A09", level: "X", what: "a step that fails leaves no interface, address, route or file", run: func(r *rig) {
		r.ok(r.call()) // makes the store's files
		c := r.call()
		broken := []call{
			c.set("runtimeConfig", map[string]any{"ips": []any{"9.0.0.1"}}),
			c.set("runtimeConfig", map[string]any{"ips": []any{"203.0.113.7"}}),
			c.set("runtimeConfig", map[string]any{"ips": []any{"nonsense"}}),
		}
		if r.p.links {
			scripted, _ := r.script(c, "garbage", "echo nonsense")
			outside, _ := r.script(c, "outside", `echo '{"cniVersion":"1.1.0","ips":[{"address":"203.0.113.7/24"}]}'`)
			// Of an overlay in which it does not rest: to give it out then is counted.
			route, _ := r.script(c.set("name", "dual"), "route", fmt.Sprintf(`echo '{"cniVersion":"1.1.0","ips":[{"address":"10.1.0.%d/25"}],"routes":[{"dst":"198.51.100.0/24","gw":"198.51.100.1"}]}'`, r.free(70).As4()[3]))
			broken = append(broken, scripted, outside, route, c.set("runtimeConfig", map[string]any{"mac": "01:00:00:00:00:00"}))
		}
		r.unchanged(func() {
			for _, c := range broken {
				if out := r.run(c); out.status <= 0 {
					r.Errorf("ADD: exit %d %s", out.status, out.stdout)
				}
			}
		}, c.netns)
	}},
	{id: "A10", level: "X", what: "ADD works after any failed ADD", run: func(r *rig) {
		c := r.call()
		r.refused(c.set("runtimeConfig", map[string]any{"ips": []any{"9.0.0.1"}}), 102)
		if r.p.links {
			bad, _ := r.script(c, "bad", "exit 3")
			r.refused(bad, 106)
		}
		r.attach(c)
	}},
	{id: "A11", level: "S", what: "a second ADD of the same attachment is an error that harms nothing",
		note: "overlay-ipam: the same address again; it is the main plugin that refuses", run: func(r *rig) {
			c := r.call()
			first := r.attach(c)
			if !r.p.links {
				if again := r.attach(c); again.addr() != first.addr() || len(r.holds(c)) != 1 {
					r.Errorf("%s, then %s", first.addr(), again.addr())
				}
				return
			}
			elsewhere := c
			elsewhere.netns = r.netns().Path
			r.unchanged(func() {
				r.refused(c, 103, "eth0")
				r.refused(elsewhere, 103, "eth0")
			}, c.netns, elsewhere.netns)
			r.ok(c.as("CHECK").set("prevResult", first.raw))
		}},
	{id: "A12", level: "M", what: "another ifname is another attachment; the same id and ifname on another network is allowed", run: func(r *rig) {
		c := r.call()
		first := r.attach(c)
		second := c
		second.ifname = "eth1"
		if got := r.attach(second).addr(); got == first.addr() {
			r.Errorf("both got %s", got)
		}
		third := c.set("name", "other-net").set("overlay", "v4")
		if r.p.links {
			third.ifname = "eth2"
		}
		if got := r.attach(third).addr(); got == first.addr() {
			r.Errorf("two networks got %s", got)
		}
		if n := len(r.holds(c)); n != 3 {
			r.Errorf("%d attachments", n)
		}
	}},
	{id: "A13", level: "X", what: "namespace missing, no namespace, another kind, our own, FIFO, directory, symlink loop, gone process: error before any change",
		not: ipamDoesNot("does not look at the namespace"), run: func(r *rig) {
			dir := r.TempDir()
			must(r, os.WriteFile(filepath.Join(dir, "file"), nil, 0o644))
			must(r, os.Symlink("loop", filepath.Join(dir, "loop")))
			r.sh(r, `mkfifo "$1/fifo"`, dir)
			r.unchanged(func() {
				for _, path := range []string{dir + "/missing", dir + "/file", dir, dir + "/loop", dir + "/fifo", "/proc/999999999/ns/net", r.Path,
					"/proc/self/ns/net", "/proc/self/ns/uts", "/dev/null", "relative/path", "/proc/self/ns/net/x"} {
					c := r.call()
					c.netns = path
					r.refused(c, 4, "CNI_NETNS")
				}
			})
		}},
	{id: "A14", level: "X", what: "an address is never that of network, broadcast, gateway, VTEP, nor resting, nor in the other half",
		note: "a resting address is given before its time only when no other is left (A16)", run: func(r *rig) {
			r.net = "small" // /28: halves of 8 addresses, 5 of them for containers
			var got []netip.Addr
			for range 5 {
				got = append(got, r.attach(r.call()).addr())
			}
			slices.SortFunc(got, netip.Addr.Compare)
			first := netip.MustParseAddr("10.4.0.2")
			if r.p.half == "docker" {
				first = netip.MustParseAddr("10.4.0.10")
			}
			for _, a := range got {
				if a != first {
					r.Errorf("addresses %v", got)
					break
				}
				first = first.Next()
			}
			r.net = "v4"
			c := r.call()
			was := r.attach(c).addr()
			r.ok(c.as("DEL"))
			for range 3 {
				if a := r.attach(r.call()).addr(); a == was {
					r.Errorf("%s was given again at once", a)
				}
			}
		}},
	{id: "A15", level: "X", what: "two families: both or none", run: func(r *rig) {
		r.net = "duo" // one IPv4 address in each half, 2^47 of IPv6
		r.attach(r.call())
		before, _ := r.list(r, r.dir)
		c := r.call()
		r.refused(c, 11, "duo")
		_, usages := r.list(r, r.dir)
		for _, u := range usages {
			if u.Overlay == "duo" && u.Half == r.p.half && u.Used != 1 {
				r.Errorf("%s: %d used", u.Range, u.Used)
			}
		}
		if after, _ := r.list(r, r.dir); len(after) != len(before) {
			r.Errorf("records: %v", after)
		}
		r.gone(c)
	}},
	{id: "A16", level: "X", what: "exhausted: code 11 names overlay, half, used, cooling and total; STATUS is then 50", run: func(r *rig) {
		r.net = "tiny"
		only := r.call()
		r.attach(only)
		words := fmt.Sprintf("overlay tiny: no address left in the %s half %s: 1 used, 0 cooling, 1 in all", r.p.half,
			map[string]string{"mesos": "10.2.0.0/30", "docker": "10.2.0.4/30"}[r.p.half])
		r.refused(r.call(), 11, words)
		r.refused(r.call().as("STATUS"), 50, words)
		r.ok(only.as("DEL"))
		r.attach(r.call()) // the resting one, early
	}},
	{id: "A17", level: "C", what: "runtimeConfig.ips and mac, args.cni.ips, CNI_ARGS IP= and MAC=, Mesos' ip_address: honoured or refused, never ignored", run: func(r *rig) {
		want := r.free(50)
		asked := func(a string) []call {
			c := r.call()
			return []call{
				c.set("runtimeConfig", map[string]any{"ips": []any{a}}),
				c.set("runtimeConfig", map[string]any{"ips": []any{a + "/25"}}),
				c.set("args", map[string]any{"cni": map[string]any{"ips": []any{a}}}),
				c.with("CNI_ARGS=IgnoreUnknown=1;IP=" + a),
				c.set("args", map[string]any{"org.apache.mesos": map[string]any{"network_info": map[string]any{"ip_addresses": []any{map[string]any{"protocol": "IPv4", "ip_address": a}}}}}),
			}
		}
		for _, c := range asked(want.String()) {
			if got := r.attach(c).addr(); got != want {
				r.Errorf("got %s, want %s", got, want)
			}
			r.ok(c.as("DEL"))
		}
		gateway := netip.AddrFrom4([4]byte{9, 0, 0, r.free(0).As4()[3] + 1})
		for _, c := range asked(gateway.String()) {
			r.refused(c, 102, gateway.String(), "gateway")
		}
		for _, c := range asked("fd00::1") {
			r.refused(c, 102, "fd00::1", "family")
		}
		if r.p.links {
			for _, c := range []call{r.call().set("runtimeConfig", map[string]any{"mac": "0e:00:00:00:00:01"}), r.call().with("CNI_ARGS=MAC=0e:00:00:00:00:01")} {
				if res := r.attach(c); res.Interfaces[1].Mac != "0e:00:00:00:00:01" {
					r.Errorf("MAC %s", res.Interfaces[1].Mac)
				}
				r.ok(c.as("DEL"))
			}
			r.refused(r.call().set("runtimeConfig", map[string]any{"mac": "01:00:5e:00:00:01"}), 7, "unicast")
		}
	}},
	{id: "A18", level: "X", what: "ADD killed by the runtime's timeout, DEL, ADD: works; the first ADD cannot come back",
		note: "there is no daemon that could complete it later: a killed program does nothing more", run: func(r *rig) {
			after := func(c call) {
				r.ok(c.as("DEL"))
				r.gone(c)
				r.attach(c)
			}
			if !r.p.links { // one transaction: anywhere before, in or after it
				for ms := range 10 {
					c := r.call()
					r.run(c.in("timeout", "-s", "KILL", fmt.Sprintf("0.%03d", ms+1)))
					after(c)
				}
				return
			}
			for _, point := range addPoints {
				c := r.call()
				killed := c.with("OVERLAY_CRASH=" + point)
				killed.bin = crashDir
				if out := r.run(killed); out.status != -1 {
					r.Fatalf("crash at %s: exit %d %s", point, out.status, out.stdout)
				}
				after(c)
			}
		}},
	{id: "A19", level: "X", what: "coordinator down, lease cached: works; lease run out: code 11 and STATUS 51; lost: 108 and 51", run: func(r *rig) {
		r.coordinator.Kill()
		c := r.call()
		r.attach(c)
		r.ok(c.as("DEL"))
		must(r, r.coordinator.Restart(context.Background()))
		r.forge(func(s map[string]any) { s["lease"].(map[string]any)["expires_boottime_ns"] = 1 })
		r.refused(r.call(), 11, "run out")
		r.refused(r.call().as("STATUS"), 51, "run out")
		r.publish(func(s map[string]any) { s["lease"].(map[string]any)["lost"] = "another host has the subnet" })
		r.refused(r.call(), 108, "another host has the subnet")
		r.refused(r.call().as("STATUS"), 51, "another host has the subnet")
	}},
	{id: "A20", level: "X", what: "two ADDs race for the last address: one wins, the other gets code 11", run: func(r *rig) {
		r.net = "tiny"
		for range 5 {
			calls := [2]call{r.call(), r.call()}
			var outs [2]outcome
			var wg sync.WaitGroup
			for i := range calls {
				wg.Go(func() { outs[i] = r.host.run(r, calls[i]) })
			}
			wg.Wait()
			won := 0
			for i, out := range outs {
				if out.status == 0 {
					won++
				} else if f := out.failure(r); f.Code != 11 {
					r.Errorf("the other got %d %s", f.Code, f.Msg)
				}
				r.ok(calls[i].as("DEL"))
			}
			if won != 1 {
				r.Errorf("%d won", won)
			}
		}
	}},
	{id: "A21", level: "X", what: "looks for no interface that is not there in a way that makes the kernel run modprobe", not: ipamDoesNot(noLinks), run: func(r *rig) {
		c := r.call()
		r.ids[c.id] = c
		// Given a name without an interface, every ioctl does, twice.
		if asked := r.trace(c, "ioctl"); strings.Contains(asked, "ENODEV") {
			r.Errorf("asked the kernel to load modules:\n%s", asked)
		}
	}},
	{id: "A22", level: "X", what: "an address that is used again early: others can have theirs while its connections are looked for", not: ipamDoesNot("leaves connections alone"), run: func(r *rig) {
		r.net = "tiny"
		first := r.call()
		r.attach(first)
		r.ok(first.as("DEL"))
		c := r.call()
		r.ids[c.id] = c
		trace := r.trace(c, "flock,socket")
		if before, _, ok := strings.Cut(trace, "NETLINK_NETFILTER"); !ok || strings.LastIndex(before, "LOCK_UN") < strings.LastIndex(before, "LOCK_EX") {
			r.Errorf("conntrack is not asked, or with the store locked:\n%s", trace)
		}
	}},
	{id: "A23", level: "X", what: "several interfaces of a container, attached at the same time: the default route is always eth0's, then eth1's", not: ipamDoesNot(noLinks), run: func(r *rig) {
		r.net = "dual"
		for range 10 {
			eth0, eth1 := r.call(), r.call()
			eth1.id, eth1.netns, eth1.ifname = eth0.id, eth0.netns, "eth1"
			eth1 = eth1.set("name", "second").set("overlay", "dual")
			var wg sync.WaitGroup
			for _, c := range []call{eth0, eth1} {
				r.ids[c.id+"/"+c.ifname] = c
				wg.Go(func() {
					if out := r.host.run(r, c); out.status != 0 {
						r.Errorf("ADD of %s: %s", c.ifname, out.stdout)
					}
				})
			}
			wg.Wait()
			through := func(want string) {
				for _, to := range []string{"192.0.2.1", "2001:db8::1"} {
					if route := r.sh(r, `ip -n "$1" route get "$2"`, filepath.Base(eth0.netns), to); !strings.Contains(route, "dev "+want+" ") {
						r.Errorf("to %s: %s", to, route)
					}
				}
			}
			through("eth0")
			r.ok(eth0.as("DEL"))
			through("eth1")
			r.ok(eth1.as("DEL"))
		}
	}},
}

// The steps of a verb at which the programs that were built for it can be killed.
var (
	addPoints = []string{"checked", "reserved", "made", "linked", "configured", "attached"}
	delPoints = []string{"unmapped", "unlinked", "released"}
)

// 1.4: DEL.
var delLines = []line{
	{id: "D01", level: "M", what: "repeated DEL succeeds each time", run: func(r *rig) {
		c := r.call()
		r.attach(c)
		for range 10 {
			r.ok(c.as("DEL"))
		}
		r.gone(c)
	}},
	{id: "D02", level: "M", what: "DEL of what was never added succeeds", run: func(r *rig) {
		r.unchanged(func() { r.ok(r.call().as("DEL")) })
		r.forge(nil) // no store at all
		r.ok(r.call().as("DEL"))
		if _, err := os.Stat(filepath.Join(r.dir, "ipam", "v4.db")); err == nil {
			r.Error("DEL made a store")
		}
	}},
	{id: "D03", level: "S", what: "CNI_NETNS empty: everything is released and removed", run: func(r *rig) {
		c := r.call()
		r.attach(c)
		r.ok(c.as("DEL").without("CNI_NETNS"))
		r.gone(c)
		r.attach(c)
		r.ok(c.as("DEL").without("CNI_NETNS").with("CNI_NETNS="))
		r.gone(c)
	}},
	{id: "D04", level: "S", what: "namespace gone: the same", run: func(r *rig) {
		c := r.call()
		r.attach(c)
		must(r, namespace(c.netns).Delete(r.Context()))
		r.ok(c.as("DEL"))
		r.gone(c)
	}},
	{id: "D05", level: "S", what: "the namespace's path is a plain file, as after a reboot: success", run: func(r *rig) {
		c := r.call()
		r.attach(c)
		del := c.as("DEL")
		del.netns = filepath.Join(r.TempDir(), "ns")
		must(r, os.WriteFile(del.netns, nil, 0o644))
		r.ok(del)
		r.gone(c)
	}},
	{id: "D06", level: "X", what: "the namespace's path belongs to another container now: its interface stays", run: func(r *rig) {
		c := r.call()
		r.attach(c)
		old := namespace(c.netns)
		must(r, old.Delete(r.Context()))
		_, err := r.lab.Netns(r.Context(), strings.TrimPrefix(old.Name, r.lab.Name+"-"))
		must(r, err)
		other := r.call()
		other.netns = c.netns
		res := r.attach(other)
		r.ok(c.as("DEL"))
		if r.p.links {
			if links := r.linksIn(c.netns); !slices.Contains(links, "eth0") {
				r.Errorf("the other container has %q", links)
			}
			r.ok(other.as("CHECK").set("prevResult", res.raw))
		}
		if n := len(r.holds(other)); n != 1 {
			r.Errorf("the other container has %d records", n)
		}
	}},
	{id: "D07", level: "S", what: "prevResult absent, null, empty, malformed or of another version: success", run: func(r *rig) {
		for _, prev := range []string{`null`, `{}`, `""`, `5`, `[]`, `{"cniVersion":"9.9.9"}`, `{"cniVersion":5}`, `{"cniVersion":"0.2.0","ip4":{"ip":"x"}}`, `{"cniVersion":"1.0.0","ips":[{"address":"9.9.9"}]}`} {
			c := r.call()
			r.attach(c)
			r.ok(c.as("DEL").set("prevResult", rawJSON(prev)))
			r.gone(c)
		}
	}},
	{id: "D08", level: "X", what: "configuration changed since ADD: still releases", run: func(r *rig) {
		type m = map[string]any
		changed := []func(call) call{
			func(c call) call {
				return c.set("mtu", "x").set("hairpinMode", 5).set("args", 5).set("runtimeConfig", "x")
			},
			func(c call) call { return c.set("cniVersion", "0.2.0") },
		}
		if r.p.links {
			changed = append(changed,
				func(c call) call { return c.set("ipam", "nonsense") },
				func(c call) call { return c.set("overlay", "v6") },
				func(c call) call { return c.set("overlay", "../v6") })
		} else {
			changed = append(changed, func(c call) call {
				return c.set("ipam", m{"type": 5, "half": "third", "runDir": r.dir, "subnet": "nonsense"})
			})
		}
		for i, change := range changed {
			c := r.call()
			r.attach(c)
			r.ok(change(c).as("DEL"))
			if a := r.holds(c); len(a) > 0 {
				r.Errorf("change %d: still in the store: %v", i, a)
			}
			r.gone(c)
		}
		r.forge(nil)
		c := r.call()
		r.attach(c)
		r.publish(func(s m) { s["overlays"] = nil }) // the network is no longer leased
		r.ok(c.as("DEL"))
		r.gone(c)
		r.publish(nil)
		r.attach(c)
		must(r, os.Remove(filepath.Join(r.dir, "state.json")))
		r.ok(c.as("DEL"))
		r.gone(c)
	}},
	{id: "D09", level: "X", what: "agent down: success", note: "there is no daemon in the path; the program opens the store itself", run: func(r *rig) {
		c := r.call()
		r.attach(c)
		r.Proc.Kill()
		r.ok(c.as("DEL"))
		r.gone(c)
		r.attach(c)
		r.startAgent(r)
	}},
	{id: "D10", level: "X", what: "coordinator down: success, and no network I/O", run: func(r *rig) {
		c := r.call()
		r.attach(c)
		r.coordinator.Kill()
		trace := r.trace(c.as("DEL"), "socket,connect")
		must(r, r.coordinator.Restart(context.Background()))
		if strings.Contains(trace, "AF_INET") || strings.Contains(trace, "AF_UNIX") {
			r.Errorf("DEL does:\n%s", trace)
		}
		r.gone(c)
	}},
	{id: "D11", level: "X", slow: true, what: "store locked: never hangs, the interface goes, and the address with the next DEL",
		note: "no tombstone: code 11 within the deadline makes the runtime call again, and what it forgets the agent releases", run: func(r *rig) {
			c := r.call()
			r.attach(c)
			unlock := r.lockStore()
			out := r.run(c.as("DEL"))
			if f := out.failure(r); f.Code != 11 || out.took > 12*time.Second {
				r.Errorf("DEL: %d %s after %s", f.Code, f.Msg, out.took)
			}
			if r.p.links && len(r.linksIn(c.netns)) > 1 {
				r.Error("the interface is still there")
			}
			unlock()
			r.ok(c.as("DEL"))
			r.gone(c)
		}},
	{id: "D12", level: "X", what: "file system full: success", run: func(r *rig) {
		r.onTmpfs()
		c := r.call()
		r.attach(c)
		r.sh(r, `dd if=/dev/zero of="$1/fill" bs=4k 2>/dev/null || true`, r.dir)
		r.ok(c.as("DEL"))
		r.gone(c)
	}},
	{id: "D13", level: "X", what: "file system read-only: code 11 with a clear text, the interface is removed", run: func(r *rig) {
		r.onTmpfs()
		c := r.call()
		r.attach(c)
		r.sh(r, `mount -o remount,ro "$1"`, r.dir)
		r.refused(c.as("DEL"), 11, "read-only")
		if r.p.links && len(r.linksIn(c.netns)) > 1 {
			r.Error("the interface is still there")
		}
		r.sh(r, `mount -o remount,rw "$1"`, r.dir)
		r.ok(c.as("DEL"))
		r.gone(c)
	}},
	{id: "D14", level: "M", what: "concurrent DELs of one attachment all succeed", run: func(r *rig) {
		c := r.call()
		r.attach(c)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if out := r.host.run(r, c.as("DEL")); out.status != 0 {
					r.Errorf("DEL: %s%s", out.stdout, out.stderr)
				}
			})
		}
		wg.Wait()
		r.gone(c)
	}},
	{id: "D15", level: "X", what: "DEL during an ADD of the same attachment: nothing stays attached", run: func(r *rig) {
		if !r.p.links { // an ADD is one transaction here: either order is sound
			for range 5 {
				c := r.call()
				var wg sync.WaitGroup
				wg.Go(func() { r.host.run(r, c) })
				wg.Go(func() { r.host.run(r, c.as("DEL")) })
				wg.Wait()
				r.ok(c.as("DEL"))
				r.gone(c)
			}
			return
		}
		c, dir := r.script(r.call(), "slow", fmt.Sprintf(`[ $CNI_COMMAND != ADD ] || sleep 1; exec %s/overlay-ipam <"${0%%/*}/slow.stdin"`, binDir))
		var add outcome
		var wg sync.WaitGroup
		wg.Go(func() { add = r.host.run(r, c) })
		r.eventually("ADD to ask for an address", func() error { _, err := os.Stat(filepath.Join(dir, "slow.calls")); return err })
		r.ok(c.as("DEL"))
		wg.Wait()
		if add.status != 0 {
			r.Errorf("ADD: %s%s", add.stdout, add.stderr)
		}
		r.gone(c)
	}},
	{id: "D16", level: "M", what: "DEL of eth1 leaves eth0 of the same container", run: func(r *rig) {
		c := r.call()
		res := r.attach(c)
		second := c
		second.ifname = "eth1"
		r.attach(second)
		r.ok(second.as("DEL"))
		if h := r.holds(c); len(h) != 1 || h[0].IfName != "eth0" {
			r.Errorf("records: %v", h)
		}
		r.ok(c.as("CHECK").set("prevResult", res.raw))
	}},
	{id: "D17", level: "M", what: "the delegate's DEL is run; its error is returned after our own clean-up", not: ipamDoesNot(noDelegate), run: func(r *rig) {
		c, dir := r.script(r.call(), "moody", fmt.Sprintf(
			`case $CNI_COMMAND in ADD) echo '{"cniVersion":"1.1.0","ips":[{"address":"%s/25"}]}';; DEL) [ -e "${0%%/*}/good" ] || { echo '{"cniVersion":"1.1.0","code":11,"msg":"not now"}'; exit 1; };; esac`, r.free(80)))
		r.ok(c)
		r.refused(c.as("DEL"), 11, "moody", "not now")
		if links := r.linksIn(c.netns); len(links) > 1 {
			r.Errorf("left: %q", links)
		}
		must(r, os.WriteFile(filepath.Join(dir, "good"), nil, 0o644))
		r.ok(c.as("DEL"))
		if got := r.calls(dir, "moody"); got != "ADD DEL DEL" {
			r.Errorf("calls: %s", got)
		}
		delete(r.ids, c.id+"/eth0/v4")
	}},
	{id: "D18", level: "X", what: "removes the pair, the record (the address rests) and the bridge's forwarding entry",
		note: "there is no per-container firewall rule; connection tracking forgets an address when it is used again early", run: func(r *rig) {
			c := r.call()
			r.attach(c)
			before := r.use(r, r.net, r.p.half)
			r.ok(c.as("DEL"))
			after := r.use(r, r.net, r.p.half)
			if after.Used != before.Used-1 || after.Cooling != before.Cooling+1 {
				r.Errorf("before %+v, after %+v", before, after)
			}
			if r.p.links {
				name := r.p.half[:1] + "-v4"
				if ports := r.sh(r, `ip -o link show master "$1"; bridge fdb show br "$1" | grep -v permanent || true`, name); ports != "" {
					r.Errorf("on %s: %s", name, ports)
				}
			}
			r.gone(c)
		}},
	{id: "D19", level: "M", what: "nothing on stdout on success", run: func(r *rig) {
		c := r.call()
		r.attach(c)
		for range 2 {
			if out := r.ok(c.as("DEL")); out.stdout != "" {
				r.Errorf("DEL printed %q", out.stdout)
			}
		}
	}},
}

// onTmpfs gives the rig a run directory on a small file system of its own.
func (r *rig) onTmpfs() {
	r.Helper()
	r.forge(nil)
	state, err := os.ReadFile(filepath.Join(r.dir, "state.json"))
	must(r, err)
	r.sh(r, `mount -t tmpfs -o size=1m tmpfs "$1"`, r.dir)
	dir := r.dir
	r.Cleanup(func() { r.sh(r, `umount -l "$1"`, dir) })
	must(r, os.WriteFile(filepath.Join(r.inside(r.dir), "state.json"), state, 0o644))
}
