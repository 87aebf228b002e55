package conformance

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// 1.1: all verbs.
var protocolLines = []line{
	{id: "P01", level: "M", what: "exit 0 on success, non-zero on failure, for all six verbs", run: func(r *rig) {
		c := r.call()
		prev := r.attach(c).raw
		ok := []call{c.as("CHECK").set("prevResult", prev), c.as("STATUS"), c.as("VERSION"), c.as("GC").set("cni.dev/valid-attachments", []any{}), c.as("DEL")}
		for _, c := range ok {
			r.ok(c)
		}
		bad := `{"cniVersion":"1.1.0","name":"../x"}`
		for _, verb := range []string{"ADD", "DEL", "CHECK", "STATUS", "GC"} {
			r.refused(c.as(verb).text(bad), 7)
		}
		r.refused(c.as("VERSION").text("nonsense"), 6)
	}},
	{id: "P02", level: "X", what: "exactly one JSON document, or nothing, on stdout for every exit path",
		note: "held against every call of this list; panics of ADD are code 109 and leave nothing",
		run: func(r *rig) {
			c := r.call()
			if r.p.links { // the usual frame runs ADD first and looks after that
				own := c
				own.netns = r.Path
				r.unchanged(func() { r.refused(own, 4, "CNI_NETNS", "the host's own namespace") })
				for _, point := range addPoints {
					panics := r.call().with("OVERLAY_PANIC=" + point)
					panics.bin = crashDir
					r.refused(panics, 109, "at "+point, "a defect of the program")
					r.gone(panics)
				}
			}
			r.refused(c.as("NONSENSE"), 4)
			r.refused(c.text(""), 6)
			r.refused(c.text("{}{}"), 6)
			r.ok(c.as("DEL"))
		}},
	{id: "P03", level: "S", what: "error documents have cniVersion (the configuration's), code and msg", run: func(r *rig) {
		for _, v := range versions {
			c := r.call().set("cniVersion", v).set("name", "no such")
			if f := r.refused(c, 7); f.CNIVersion != v {
				r.Errorf("cniVersion %s in an answer to %s", f.CNIVersion, v)
			}
		}
		if f := r.refused(r.call().set("cniVersion", nil).set("name", "no such"), 7); f.CNIVersion != "0.1.0" {
			r.Errorf("cniVersion %s in an answer to a configuration without", f.CNIVersion)
		}
	}},
	{id: "P04", level: "M/S", what: "well-known codes with their meaning only; own codes from 100, documented",
		note: "the table is below; held against every error of this list", run: func(r *rig) {
			c := r.call()
			r.refused(c.set("cniVersion", "9.9.9"), 1)
			r.refused(c.without("CNI_IFNAME"), 4)
			r.refused(c.text("{"), 6)
			r.refused(c.set("name", nil), 7)
			r.refused(c.set("overlay", "unknown").set("ipam", map[string]any{"type": "overlay-ipam", "half": r.p.half, "runDir": r.dir}), 101, "unknown")
		}},
	{id: "P05", level: "S", what: "code 1 for an unsupported cniVersion; details name the supported ones", run: func(r *rig) {
		r.refused(r.call().set("cniVersion", "0.5.0"), 1, append([]string{"0.5.0"}, versions...)...)
	}},
	{id: "P06", level: "M", what: "code 4 names every missing or invalid variable at once", run: func(r *rig) {
		c := r.call()
		r.refused(c.without("CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"), 4, "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS")
		c.id = "../etc"
		r.refused(c.without("CNI_IFNAME"), 4, "CNI_CONTAINERID", "../etc", "CNI_IFNAME")
	}},
	{id: "P07", level: "M", what: "the refusal of a field names key and value",
		note: "code 2 is not used: a field that is not known is accepted (P15), one that makes no sense is code 7", run: func(r *rig) {
			c := r.call()
			r.refused(c.set("mtu", "many"), 7, "mtu", "string")
			if r.p.links {
				r.refused(c.set("mtu", 99999), 7, "mtu", "99999")
			} else {
				r.refused(c.set("ipam", map[string]any{"type": "overlay-ipam", "half": "third", "runDir": r.dir}), 7, "ipam.half", "third")
			}
			r.refused(c.set("name", "a/b"), 7, "name", "a/b")
		}},
	{id: "P08", level: "M", what: "code 3 never after a side effect", note: "code 3 is never answered", run: func(r *rig) {
		c := r.call()
		r.ok(c.as("DEL"))
		r.refused(c.as("CHECK").set("prevResult", map[string]any{"cniVersion": "1.1.0", "interfaces": []any{}, "ips": []any{}}), 105)
	}},
	{id: "P09", level: "S", what: "code 5 when stdin cannot be read, or is never closed",
		note: "a document that ends too early is code 6: it cannot be told from a malformed one", run: func(r *rig) {
			c := r.call()
			r.refused(c.in("sh", "-c", `exec "$0" </`), 5)
			r.refused(c.as("STATUS").in("sh", "-c", `sleep 3 | exec "$0"`), 5, "stdin")
			r.refused(c.text(`{"cniVersion":"1.1.0","name":`), 6, "too early")
		}},
	{id: "P10", level: "S", what: "code 6 for malformed JSON", run: func(r *rig) {
		for _, in := range []string{"", "{", "[]", "null", "true", "nope", "{}}", "{} {}", "\xef\xbb\xbf{}", `{"name":"v4",}`, "{'name':'v4'}", "\x00"} {
			r.refused(r.call().text(in), 6)
		}
	}},
	{id: "P11", level: "S", what: "code 7 for a configuration that makes no sense", run: func(r *rig) {
		c := r.call()
		for key, v := range map[string]any{"name": nil, "ipam": "static", "runtimeConfig": []any{}, "overlay": "../x", "args": 5} {
			r.refused(c.set(key, v), 7, key)
		}
		r.refused(c.set("runDir", "relative").set("ipam", map[string]any{"type": "overlay-ipam", "half": r.p.half, "runDir": "relative"}), 7, "runDir")
	}},
	{id: "P12", level: "S", what: "code 11 for what passes: nothing published, lease run out, store busy (P25)", run: func(r *rig) {
		r.forge(nil)
		must(r, os.Remove(filepath.Join(r.dir, "state.json")))
		r.refused(r.call(), 11, "has not published yet", "overlayd agent")
		r.publish(func(s map[string]any) { s["lease"].(map[string]any)["expires_boottime_ns"] = 1 })
		r.refused(r.call(), 11, "lease of this host has run out")
		r.publish(func(s map[string]any) { s["boot_id"] = "22222222-2222-4222-8222-222222222222" })
		r.refused(r.call(), 11, "before the last reboot")
	}},
	{id: "P13", level: "S", what: "unknown CNI_COMMAND is code 4; an empty one prints an about text on stderr and touches nothing", run: func(r *rig) {
		c := r.call()
		r.unchanged(func() {
			for _, verb := range []string{"add", "Add", "ADD ", "UPDATE", "\u00c4DD"} {
				r.refused(c.as(verb), 4, "CNI_COMMAND")
			}
			for _, c := range []call{c.as(""), c.without("CNI_COMMAND", "CNI_PATH", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "PATH").text("")} {
				if out := r.ok(c); out.stdout != "" || !strings.HasPrefix(out.stderr, "CNI plugin "+r.p.name) {
					r.Errorf("about text: stdout %q, stderr %q", out.stdout, out.stderr)
				}
			}
		}, c.netns)
	}},
	{id: "P14", level: "M", what: "VERSION, STATUS and GC work without container id, namespace and interface", run: func(r *rig) {
		c := r.call().without("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME")
		r.ok(c.as("VERSION"))
		r.ok(c.as("STATUS"))
		r.ok(c.as("GC").set("cni.dev/valid-attachments", []any{}))
	}},
	{id: "P15", level: "M", what: "unknown keys of the configuration and of args are accepted", run: func(r *rig) {
		c := r.call().set("x-vendor", map[string]any{"a": []any{1, nil, "b"}}).set("args", map[string]any{"labels": []any{map[string]any{"key": "k"}}, "cni": map[string]any{"x": 1}})
		c = c.set("runtimeConfig", map[string]any{"bandwidth": map[string]any{"ingressRate": 1}}).set("capabilities", map[string]any{"ips": true, "zzz": true})
		r.attach(c)
	}},
	{id: "P16", level: "M", what: "network name and container id must match the pattern, else 7 / 4, and nothing is made", run: func(r *rig) {
		r.unchanged(func() {
			for _, bad := range []string{"../x", "a/b", ".a", "-a", "_a", "a b", "a\nb", "ä", "a;b", "$(a)", "a\\b", "%s", "~a", "a:b"} {
				r.refused(r.call().set("name", bad), 7, "name")
				c := r.call()
				c.id = bad
				r.refused(c, 4, "CNI_CONTAINERID")
				r.refused(c.as("DEL"), 4, "CNI_CONTAINERID")
			}
		})
	}},
	{id: "P17", level: "X", what: "names up to 255 and container ids up to 1024 bytes; longer ones refused; none becomes a file or device name", run: func(r *rig) {
		c := r.call().set("name", strings.Repeat("n", 255)).set("overlay", "v4")
		c.id = strings.Repeat("i", 1024)
		r.attach(c)
		if h := r.holds(c); len(h) != 1 || len(h[0].Network) != 255 {
			r.Errorf("stored: %v", h)
		}
		if _, err := os.Stat(filepath.Join(r.dir, "ipam", "v4.db")); err != nil {
			r.Error(err)
		}
		r.ok(c.as("DEL"))
		r.gone(c)
		r.refused(c.set("name", strings.Repeat("n", 256)), 7, "256")
		r.refused(c.set("overlay", strings.Repeat("o", 14)), 7, "overlay")
		c.id += "i"
		r.refused(c, 4, "1025")
	}},
	{id: "P18", level: "M", what: "CNI_IFNAME: at most 15 bytes, no '.', '..', '/', ':', white space, '%', control bytes, leading '-', invalid UTF-8", run: func(r *rig) {
		c := r.call()
		r.unchanged(func() {
			for _, bad := range []string{"", ".", "..", "a/b", "a:b", "a b", "eth%d", "a\tb", "a\x01b", "-eth0", "a\xffb", "0123456789abcdef", "a\u00a0b", "a\n"} {
				c.ifname = bad
				r.refused(c, 4, "CNI_IFNAME")
			}
		}, c.netns)
		c.ifname = "0123456789abcde"
		r.attach(c)
	}},
	{id: "P19", level: "C", what: "CNI_ARGS: absent, IgnoreUnknown, unknown keys, values with '=', empty pairs, 64 KiB", run: func(r *rig) {
		for _, args := range []string{"", "IgnoreUnknown=1", "IgnoreUnknown=1;K8S_POD_NAME=x;K8S_POD_NAMESPACE=y", "A=b=c=d", ";;=;A;=b;", "A=" + strings.Repeat("x", 64<<10)} {
			c := r.call().with("CNI_ARGS=" + args)
			r.attach(c)
			r.ok(c.as("DEL"))
		}
	}},
	{id: "P20", level: "C", what: "with args.cni.ips, IP= in CNI_ARGS is ignored", run: func(r *rig) {
		want, other := r.free(60), r.free(61)
		c := r.call().set("args", map[string]any{"cni": map[string]any{"ips": []any{want.String()}}}).with("CNI_ARGS=IP=" + other.String())
		if got := r.attach(c).addr(); got != want {
			r.Errorf("got %s, want %s", got, want)
		}
	}},
	{id: "P21", level: "M", what: "CNI_PATH is optional", run: func(r *rig) {
		c := r.call().without("CNI_PATH", "PATH")
		prev := r.attach(c).raw
		r.ok(c.as("CHECK").set("prevResult", prev))
		r.ok(c.as("STATUS"))
		r.ok(c.as("GC").set("cni.dev/valid-attachments", []any{}))
		r.ok(c.as("DEL"))
	}},
	{id: "P22", level: "X", what: "works with CNI_* and PATH alone, umask 0777, cwd /, closed descriptors", run: func(r *rig) {
		r.forge(nil) // so that it makes its files under that umask
		umask := []string{"sh", "-c", `umask 0777; cd /; exec "$0" 2>&-`}
		for range 2 {
			c := r.call().in(umask...)
			r.attach(c)
			r.ok(c.as("DEL"))
			r.gone(c)
		}
		c := r.call()
		if out := r.run(c.in("sh", "-c", `exec "$0" <&-`)); out.status == 0 {
			r.Errorf("ADD without stdin: %s", out.stdout)
		}
		if out := r.run(c.in("sh", "-c", `exec "$0" >&- 2>&-`)); out.status == 0 {
			r.Error("ADD without stdout succeeded")
		}
		r.gone(c)
	}},
	{id: "P23", level: "M", what: "concurrent executions for different containers are safe", run: func(r *rig) {
		const n = 50
		calls := make([]call, n)
		for i := range calls {
			calls[i] = r.call()
			r.ids[calls[i].id] = calls[i]
		}
		all := func(verb string) []outcome {
			outs := make([]outcome, n)
			var wg sync.WaitGroup
			for i := range calls {
				wg.Go(func() { outs[i] = r.host.run(r, calls[i].as(verb)) })
			}
			wg.Wait()
			for i, o := range outs {
				if o.status != 0 {
					r.Errorf("%s %d: %s%s", verb, i, o.stdout, o.stderr)
				}
			}
			return outs
		}
		seen := map[netip.Addr]bool{}
		for _, o := range all("ADD") {
			if o.status == 0 {
				seen[r.parse(o).addr()] = true
			}
		}
		if attachments, _ := r.list(r, r.dir); len(attachments) != n || len(seen) != n {
			r.Errorf("%d records and %d addresses for %d containers", len(attachments), len(seen), n)
		}
		all("DEL")
		for _, c := range calls {
			if r.p.links && len(r.linksIn(c.netns)) > 1 {
				r.Errorf("left in %s", c.netns)
			}
		}
	}},
	{id: "P24", level: "X", what: "stdin at most 1 MiB, depth 64, no duplicate or case-variant keys", run: func(r *rig) {
		c := r.call()
		r.unchanged(func() {
			r.refused(c.set("x", strings.Repeat("x", 1<<20)), 6, "1048576")
			r.refused(c.text(`{"name":"v4","x":`+strings.Repeat("[", 65)+strings.Repeat("]", 65)+`}`), 6, "64")
			r.refused(c.text(`{"cniVersion":"1.1.0","name":"v4","NAME":"v6"}`), 7, "NAME")
			r.refused(c.text(`{"cniVersion":"1.1.0","name":"v4","name":"v6"}`), 7, "name")
			r.refused(c.text(`{"cniVersion":"1.1.0","name":"v4","ipam":{"type":"a","Type":"b"}}`), 7, "Type")
		}, c.netns)
	}},
	{id: "P25", level: "X", slow: true, what: "every verb ends within its deadline: agent stopped, coordinator stopped, store locked",
		note: "ADD, DEL, GC 10 s, CHECK 5 s, STATUS, VERSION 1 s, and the time the machine takes to start a program", run: func(r *rig) {
			c := r.call()
			prev := r.attach(c).raw
			defer r.lockStore()()
			var wg sync.WaitGroup
			for verb, limit := range map[string]time.Duration{"ADD": 10 * time.Second, "DEL": 10 * time.Second, "CHECK": 5 * time.Second, "STATUS": time.Second, "GC": 10 * time.Second, "VERSION": time.Second} {
				v := c.as(verb).set("prevResult", prev).set("cni.dev/valid-attachments", []any{})
				if verb == "ADD" {
					v = r.call()
				}
				wg.Go(func() {
					out := r.host.run(r, v)
					if out.took > limit+2*time.Second {
						r.Errorf("%s took %s", verb, out.took)
					}
					if verb == "VERSION" {
						if out.status != 0 {
							r.Errorf("VERSION: %s", out.stdout)
						}
						return
					}
					code := 11
					if verb == "STATUS" {
						code = 50
					}
					if f := out.failure(r); out.status != 1 || f.Code != code {
						r.Errorf("%s: %d %s, want code %d", verb, out.status, out.stdout, code)
					}
				})
			}
			wg.Wait()
		}},
	{id: "P26", level: "X", what: "a result that cannot be written: ADD takes everything back and fails", run: func(r *rig) {
		for _, sh := range []string{`exec "$0" >&-`, `exec "$0" >/dev/full`, `exec 3>&1; { "$0"; echo $? >&3; } | true`} {
			c := r.call()
			before := r.used()
			out := r.host.run(r, c.in("sh", "-c", sh))
			if out.status == 0 && strings.TrimSpace(out.stdout) != "1" {
				r.Errorf("%s: ADD succeeded: %q", sh, out.stdout)
			}
			r.gone(c)
			if after := r.used(); after != before {
				r.Errorf("%s: %d addresses in use, before %d", sh, after, before)
			}
		}
	}},
	{id: "P27", level: "X", what: "SIGTERM or SIGKILL at any instant: the next DEL cleans everything",
		note: "at random instants here; at every step in the crash sweep", run: func(r *rig) {
			for i := range 12 {
				c := r.call()
				r.host.run(r, c.in("timeout", "-s", []string{"KILL", "TERM"}[i%2], fmt.Sprintf("0.%04d", 1+rand.IntN(160))))
				r.ok(c.as("DEL"))
				r.gone(c)
			}
		}},
}

// free is an address of the rig's half of v4, far from those given in order.
func (r *rig) free(n byte) netip.Addr {
	if r.p.half == "docker" {
		n += 128
	}
	return netip.AddrFrom4([4]byte{9, 0, 0, n})
}

// used is how many addresses of the rig's half are in use.
func (r *rig) used() int { return r.use(r, r.net, r.p.half).Used }

// lockStore takes the lock of the rig's overlay, as another program that hangs,
// and returns what gives it back.
func (r *rig) lockStore() func() {
	r.Helper()
	f, err := os.OpenFile(filepath.Join(r.dir, "ipam", r.net+".lock"), os.O_RDWR, 0)
	must(r, err)
	must(r, syscall.Flock(int(f.Fd()), syscall.LOCK_EX))
	return func() { f.Close() }
}

// 1.2: VERSION and negotiation.
var versionLines = []line{
	{id: "V01", level: "M", what: "VERSION prints the supported versions", run: func(r *rig) {
		var said struct{ SupportedVersions []string }
		out := r.ok(r.call().as("VERSION"))
		must(r, unmarshal(out.stdout, &said))
		if !slices.Equal(said.SupportedVersions, versions) {
			r.Errorf("supported: %q", said.SupportedVersions)
		}
	}},
	{id: "V02", level: "M", what: "cniVersion in the answer to VERSION is the one on stdin", run: func(r *rig) {
		for _, v := range versions {
			var said struct{ CNIVersion string }
			must(r, unmarshal(r.ok(r.call().as("VERSION").text(`{"cniVersion":"`+v+`"}`)).stdout, &said))
			if said.CNIVersion != v {
				r.Errorf("%s for %s", said.CNIVersion, v)
			}
		}
	}},
	{id: "V03", level: "X", what: "VERSION works with nothing but CNI_COMMAND, and opens no file of ours and no socket", run: func(r *rig) {
		c := r.call().as("VERSION").text("").without("CNI_PATH", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "PATH")
		for line := range strings.Lines(r.trace(c, "openat,open,socket,mkdir,mkdirat")) {
			// The Go runtime asks for the size of huge pages and for its own maps.
			if !strings.Contains(line, `"/sys/kernel/mm/`) && !strings.Contains(line, `"/proc/self/`) && !strings.Contains(line, "+++") && !strings.Contains(line, "---") && !strings.Contains(line, "/sys/fs/cgroup") {
				r.Errorf("VERSION does: %s", line)
			}
		}
	}},
	{id: "V04", level: "M", what: "missing or empty cniVersion is 0.1.0", run: func(r *rig) {
		for _, v := range []any{nil, ""} {
			c := r.call().set("cniVersion", v)
			res := r.attach(c)
			if _, ok := res.raw["ip4"]; !ok || res.CNIVersion != "0.1.0" {
				r.Errorf("result: %v", res.raw)
			}
		}
	}},
	{id: "V05", level: "M", what: "unknown versions are code 1 and have no side effect", run: func(r *rig) {
		c := r.call()
		r.unchanged(func() {
			for _, v := range []string{"0.5.0", "1.2.0", "2.0.0", "1.1", "v1.1.0", "abc", "0.3.2", " 1.0.0", "1.0.0-rc1"} {
				for _, verb := range []string{"ADD", "DEL"} {
					r.refused(c.as(verb).set("cniVersion", v), 1)
				}
			}
		}, c.netns)
	}},
	{id: "V06", level: "M", what: "CHECK before 0.4.0, GC and STATUS before 1.1.0 are code 1", run: func(r *rig) {
		for _, v := range versions {
			c := r.call().set("cniVersion", v).set("cni.dev/valid-attachments", []any{})
			if v < "0.4.0" {
				r.refused(c.as("CHECK"), 1, v, "CHECK")
			}
			if v < "1.1.0" {
				r.refused(c.as("GC"), 1, v, "GC")
				r.refused(c.as("STATUS"), 1, v, "STATUS")
			}
		}
	}},
	{id: "V07", level: "M", what: "cniVersions beside cniVersion is tolerated and not used", run: func(r *rig) {
		c := r.call().set("cniVersion", "0.4.0").set("cniVersions", []any{"1.0.0", "1.1.0", "9.9.9"})
		if res := r.parse(r.ok(c)); res.CNIVersion != "0.4.0" {
			r.Errorf("answered in %s", res.CNIVersion)
		}
	}},
}

// trace runs a call that must succeed and returns its system calls of a kind.
func (r *rig) trace(c call, syscalls string) string {
	r.Helper()
	file := filepath.Join(r.TempDir(), "trace")
	r.ok(c.in("strace", "-f", "-qq", "-o", file, "-e", "trace="+syscalls))
	b, err := os.ReadFile(file)
	must(r, err)
	return string(b)
}
