package conformance

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/integration/lab/ucr"
)

// 1.9: conversion of results.
var resultLines = []line{
	{id: "R01", level: "M", what: "0.1.0 and 0.2.0: ip4 and ip6 with ip, gateway and routes; what they cannot hold is logged", run: func(r *rig) {
		r.net = "dual"
		for _, v := range []string{"0.1.0", "0.2.0"} {
			raw := r.parse(r.ok(r.call().set("cniVersion", v))).raw
			for _, key := range []string{"ip4", "ip6"} {
				ip, _ := raw[key].(map[string]any)
				if ip["ip"] == nil || ip["gateway"] == nil || ip["routes"] == nil {
					r.Errorf("%s: %s is %v", v, key, ip)
				}
			}
			for _, key := range []string{"ips", "interfaces"} {
				if raw[key] != nil {
					r.Errorf("%s has %s", v, key)
				}
			}
		}
		if r.p.links {
			r.net = "v4"
			c := r.call().set("cniVersion", "0.2.0").set("prevResult", map[string]any{"cniVersion": "0.2.0", "ip4": map[string]any{"ip": "192.0.2.9/24"}})
			out := r.ok(c)
			mine := r.holds(c)[0].Addrs[0].String()
			if !strings.Contains(out.stdout, "192.0.2.9/24") || !strings.Contains(out.stderr, mine) {
				r.Errorf("%s was dropped and not logged: stdout %s stderr %q", mine, out.stdout, out.stderr)
			}
		}
	}},
	{id: "R02", level: "M", what: "0.3.0 to 0.4.0: ips with version 4 or 6 and index of the interface", run: func(r *rig) {
		r.net = "dual"
		for _, v := range []string{"0.3.0", "0.3.1", "0.4.0"} {
			raw := r.parse(r.ok(r.call().set("cniVersion", v))).raw
			for i, ip := range raw["ips"].([]any) {
				m := ip.(map[string]any)
				if m["version"] != []string{"4", "6"}[i] || (m["interface"] != nil) != r.p.links {
					r.Errorf("%s: %v", v, m)
				}
			}
		}
	}},
	{id: "R03", level: "M", what: "1.0.0 and later: no version of addresses", run: func(r *rig) {
		for _, v := range []string{"1.0.0", "1.1.0"} {
			for _, ip := range r.parse(r.ok(r.call().set("cniVersion", v))).raw["ips"].([]any) {
				if ip.(map[string]any)["version"] != nil {
					r.Errorf("%s: %v", v, ip)
				}
			}
		}
	}},
	{id: "R04", level: "M", what: "1.1.0: mtu of interfaces, which 1.0.0 and earlier do not have", not: ipamDoesNot(noLinks),
		note: "the specification's own library shows it in 1.0.0 too", run: func(r *rig) {
			for _, v := range []string{"0.4.0", "1.0.0", "1.1.0"} {
				for _, i := range r.parse(r.ok(r.call().set("cniVersion", v))).raw["interfaces"].([]any) {
					if (i.(map[string]any)["mtu"] != nil) != (v >= "1.1.0") {
						r.Errorf("%s: %v", v, i)
					}
				}
			}
		}},
	{id: "R05", level: "X", what: "a result without an address is refused before anything is made", not: ipamDoesNot("always gives an address"), run: func(r *rig) {
		c, _ := r.script(r.call().set("cniVersion", "0.2.0"), "empty", `[ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"0.2.0","dns":{}}'`)
		r.unchanged(func() { r.refused(c, 106, "no address") }, c.netns)
	}},
	{id: "R06", level: "X", what: "prevResult of another version, null and missing arrays, unknown keys", not: ipamDoesNot("is never in a chain"),
		note: "unknown keys are accepted; a result has the keys of its version", run: func(r *rig) {
			for _, prev := range []string{
				`{"cniVersion":"0.2.0","ip4":{"ip":"192.0.2.9/24"}}`,
				`{"cniVersion":"0.4.0","interfaces":null,"ips":[{"version":"4","address":"192.0.2.9/24"}],"routes":null}`,
				`{"cniVersion":"1.0.0","ips":[{"address":"192.0.2.9/24"}],"x":{"y":1}}`,
			} {
				res := r.attach(r.call().set("prevResult", rawJSON(prev)))
				if len(res.IPs) != 2 || res.IPs[0].Address.String() != "192.0.2.9/24" || len(res.Interfaces) != 2 || *res.IPs[1].Interface != 1 {
					r.Errorf("%s: %v", prev, res.raw)
				}
			}
			for _, prev := range []string{`{"cniVersion":"1.1.0"}`, `{"cniVersion":"1.1.0","interfaces":[],"ips":[],"routes":[]}`, `null`} {
				if res := r.attach(r.call().set("prevResult", rawJSON(prev))); len(res.IPs) != 1 {
					r.Errorf("%s: %v", prev, res.raw)
				}
			}
		}},
	{id: "R07", level: "X", what: "the result always has cniVersion, and is word for word what the golden file says: 7 versions, 3 kinds of addresses, alone and chained", run: func(r *rig) {
		r.golden()
	}},
	{id: "R08", level: "X", what: "Mesos' parser takes the result and finds an address in it", run: func(r *rig) {
		for _, net := range []string{"v4", "v6", "dual"} {
			r.net = net
			for _, v := range []any{nil, "0.1.0", "0.2.0"} {
				out := r.ok(r.call().set("cniVersion", v))
				res, err := ucr.ParseResult([]byte(out.stdout))
				if err != nil || (res.IP4 == nil) != (net == "v6") || (res.IP6 == nil) != (net == "v4") {
					r.Errorf("%s %v: %v\n%s", net, v, err, out.stdout)
				}
			}
		}
	}},
	{id: "R09", level: "M", what: "mtu, socketPath and pciID of interfaces, and all of routes but dst and gw, only from 1.1.0 on", run: func(r *rig) {
		for _, v := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			c := r.call().set("cniVersion", v)
			c.ifname = "eth1" // its routes have a metric
			res := r.attach(c)
			for _, list := range []string{"interfaces", "routes"} {
				all, _ := res.raw[list].([]any)
				for _, o := range all {
					for key := range o.(map[string]any) {
						if v != "1.1.0" && !slices.Contains([]string{"name", "mac", "sandbox", "dst", "gw"}, key) {
							r.Errorf("%s: %s have %q", v, list, key)
						}
					}
				}
			}
			r.ok(c.as("DEL"))
		}
	}},
	{id: "R10", level: "S", what: "dns of the configuration, else of ipam.resolvConf, is in the result of every version; ipam.routes stand for the default route", run: func(r *rig) {
		file := filepath.Join(r.TempDir(), "resolv.conf")
		must(r, os.WriteFile(file, []byte("nameserver 192.0.2.54\nsearch file.example\n"), 0o644))
		dns := map[string]any{"nameservers": []any{"192.0.2.53"}, "search": []any{"conf.example"}}
		for _, v := range versions {
			for want, c := range map[string]call{
				"192.0.2.53": r.call().set("dns", dns), "192.0.2.54": r.call().ipam("resolvConf", file),
			} {
				if !r.p.links && want == "192.0.2.53" {
					continue // the main plugin's
				}
				out := r.ok(c.set("cniVersion", v))
				var res struct {
					DNS struct{ Nameservers []string }
				}
				must(r, json.Unmarshal([]byte(out.stdout), &res))
				if len(res.DNS.Nameservers) != 1 || res.DNS.Nameservers[0] != want {
					r.Errorf("%s: want name server %s:\n%s", v, want, out.stdout)
				}
				r.ok(c.as("DEL"))
			}
		}
		res := r.attach(r.call().ipam("routes", []any{map[string]any{"dst": "192.0.2.0/24"}}))
		if len(res.Routes) != 1 || res.Routes[0].Dst.String() != "192.0.2.0/24" {
			r.Errorf("routes %v", res.Routes)
		}
		r.refused(r.call().ipam("routes", "all"), 7, "ipam.routes")
		r.refused(r.call().ipam("resolvConf", "/nonexistent"), 7, "ipam.resolvConf")
	}},
}

// golden compares results with testdata/<program>.golden, a section for each.
// Everything in them is known beforehand: the first agent's subnets, addresses
// asked for by name, and so MACs; the host's name for the interface follows from
// the container's.
func (r *rig) golden() {
	r.Helper()
	var b strings.Builder
	wanted := map[string][]any{"v4": {r.free(100).String()}, "v6": {"fd01:b::100"}, "dual": {"10.1.0.100", "fd01:c::100"}}
	if r.p.half == "docker" {
		wanted["v6"], wanted["dual"] = []any{"fd01:b::8000:0:100"}, []any{"10.1.0.200", "fd01:c::8000:0:100"}
	}
	for _, net := range []string{"v4", "v6", "dual"} {
		r.net = net
		for _, chained := range []bool{false, true} {
			if chained && !r.p.links {
				continue // never in a chain
			}
			for _, v := range versions {
				c := r.call().set("cniVersion", v).set("runtimeConfig", map[string]any{"ips": wanted[net]})
				c.id = "golden"
				title := fmt.Sprintf("%s %s alone", v, net)
				if chained {
					title = fmt.Sprintf("%s %s chained", v, net)
					c = c.set("prevResult", previous(v))
				}
				out := r.ok(c)
				fmt.Fprintf(&b, "== %s\n%s", title, strings.ReplaceAll(out.stdout, c.netns, "/run/netns/golden"))
				r.ok(c.as("DEL"))
			}
		}
	}
	file := filepath.Join("testdata", r.p.name+".golden")
	if *update {
		must(r, os.WriteFile(file, []byte(b.String()), 0o644))
	}
	want, err := os.ReadFile(file)
	must(r, err)
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		r.Errorf("results (-want +got):\n%s", diff)
	}
}

// previous is the result of a plugin that stands before ours in a chain, in the
// words of that version.
func previous(version string) any {
	switch version {
	case "0.1.0", "0.2.0":
		return rawJSON(`{"cniVersion":"` + version + `","dns":{"nameservers":["192.0.2.53"]}}`)
	case "0.3.0", "0.3.1", "0.4.0":
		return rawJSON(`{"cniVersion":"` + version + `","interfaces":[{"name":"net7","mac":"02:00:00:00:00:07","sandbox":"/run/netns/golden"}],
			"ips":[{"version":"4","interface":0,"address":"192.0.2.9/24","gateway":"192.0.2.1"}],
			"routes":[{"dst":"198.51.100.0/24","gw":"192.0.2.1"}],"dns":{"nameservers":["192.0.2.53"]}}`)
	}
	return rawJSON(`{"cniVersion":"` + version + `","interfaces":[{"name":"net7","mac":"02:00:00:00:00:07","sandbox":"/run/netns/golden"}],
		"ips":[{"interface":0,"address":"192.0.2.9/24","gateway":"192.0.2.1"}],
		"routes":[{"dst":"198.51.100.0/24","gw":"192.0.2.1"}],"dns":{"nameservers":["192.0.2.53"]}}`)
}
