package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"overlayd.internal/overlay/integration/lab/ucr"
)

const notMesos = "is not what Mesos runs; m- and d-overlay have their addresses from the same code"

// 1.10: what the runtimes really do.
var runtimeLines = []line{
	{id: "Z01", level: "X", what: "a configuration without cniVersion, as DC/OS wrote them: result of 0.1.0", run: func(r *rig) {
		res := r.parse(r.ok(r.call().set("cniVersion", nil)))
		if res.CNIVersion != "0.1.0" || res.raw["ip4"] == nil {
			r.Errorf("result: %v", res.raw)
		}
	}},
	{id: "Z02", level: "X", what: "Mesos: ADD with its environment and stdin, DEL with the checkpointed configuration, without CNI_NETNS and prevResult", not: ipamDoesNot(notMesos), run: func(r *rig) {
		ctx := context.Background()
		for _, handle := range []bool{true, false} {
			iso, id := r.isolator(r.networkFile(nil)), r.newID()
			must(r, iso.Isolate(ctx, id, r.netns().Path))
			results, err := iso.Attach(ctx, id, ucr.NetworkInfo{Name: "v4", Labels: [][2]string{{"app", "a"}}}, ucr.NetworkInfo{})
			must(r, err)
			if len(results) != 1 || !strings.HasPrefix(results[0].IP4.Prefix().String(), "9.0.0.") {
				r.Errorf("results: %+v", results)
			}
			recovered, err := iso.Recover(id)
			if err != nil || recovered["eth0"].IP4.Prefix() != results[0].IP4.Prefix() {
				r.Errorf("recovered %v, %v", recovered, err)
			}
			must(r, os.Remove(filepath.Join(iso.ConfDir, "v4.conf"))) // DEL does not need it
			if !handle {
				must(r, iso.Forget(ctx, id))
			}
			must(r, iso.Del(ctx, id))
			must(r, iso.Del(ctx, id)) // for an orphan it comes again
			must(r, iso.Detach(ctx, id))
			r.gone(call{id: id})
		}
	}},
	{id: "Z03", level: "X", what: "Mesos loses its directory in a reboot and never calls DEL: the first use in a new boot releases everything", run: func(r *rig) {
		r.forge(nil)
		reboot := filepath.Join(r.TempDir(), "boot_id")
		must(r, os.WriteFile(reboot, []byte("33333333-3333-4333-8333-333333333333\n"), 0o644))
		c := r.call()
		first := r.attach(c)
		if r.p.links { // gone in a reboot
			r.sh(r, `ip link del "$1"`, first.Interfaces[0].Name)
		}
		r.publish(func(s map[string]any) { s["boot_id"] = "33333333-3333-4333-8333-333333333333" })
		after := []string{"unshare", "--mount", "--propagation", "private", "sh", "-c", `mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"`, reboot}
		other := r.call().in(after...)
		second := r.attach(other)
		if first.addr() == second.addr() {
			r.Errorf("%s did not rest", first.addr())
		}
		r.ok(c.as("DEL").in(after...)) // with a kept directory DEL does come
		r.ok(other.as("DEL").in(after...))
		delete(r.ids, c.id+"/eth0/v4")
		delete(r.ids, other.id+"/eth0/v4")
	}},
	{id: "Z04", level: "X", what: "nested container ids with dots", run: func(r *rig) {
		parent := "9f3c5a1e-7b1d-4c55-9a39-2d1f6f0a1b11"
		for _, id := range []string{parent, parent + ".0f6d1c7e-1111-4222-8333-944455566677", parent + ".a.b.c..d-"} {
			c := r.call()
			c.id = id
			r.attach(c)
			r.ok(c.as("DEL").without("CNI_NETNS"))
			r.gone(c)
		}
	}},
	{id: "Z05", level: "X", what: "args.org.apache.mesos.network_info of any size and content", run: func(r *rig) {
		var labels []any
		for i := range 5000 {
			labels = append(labels, map[string]any{"key": fmt.Sprintf("key-%d", i), "value": strings.Repeat("v", 100)})
		}
		for _, info := range []map[string]any{
			{"name": "v4", "labels": map[string]any{"labels": labels}, "groups": []any{"a", "b"}, "ip_addresses": []any{map[string]any{"protocol": "IPv4"}}},
			{"name": "another", "ip_addresses": []any{}},
			{"ip_addresses": []any{map[string]any{"protocol": "IPv6"}}, "x": nil},
			{},
		} {
			c := r.call().set("cniVersion", nil).set("args", map[string]any{"org.apache.mesos": map[string]any{"network_info": info}})
			r.ok(c)
			r.ok(c.as("DEL"))
		}
	}},
	{id: "Z06", level: "X", what: "neither stream holds the configuration or arguments when a call fails", run: func(r *rig) {
		const secret = "hunter2-hunter2"
		c := r.call().set("password", secret).set("args", map[string]any{"labels": secret}).with("CNI_ARGS=TOKEN="+secret, "AWS_SECRET="+secret)
		for _, bad := range []call{c.set("mtu", "x"), c.set("cniVersion", "9"), c.as("NONSENSE"), c.without("CNI_IFNAME"), c.set("overlay", "unknown"), c.set("prevResult", map[string]any{"cniVersion": "1.1.0", "ips": secret}), c.as("CHECK")} {
			out := r.run(bad)
			if strings.Contains(out.stdout+out.stderr, secret) {
				r.Errorf("stdout %s\nstderr %s", out.stdout, out.stderr)
			}
			if out.status == 0 {
				r.ok(bad.as("DEL"))
			}
		}
	}},
	{id: "Z07", level: "X", what: "stdout ends with the program, whatever a delegate leaves running, and a delegate has no descriptors of ours", not: ipamDoesNot(noDelegate), run: func(r *rig) {
		c, dir := r.script(r.call(), "leaves", fmt.Sprintf(
			`ls -l /proc/self/fd >"${0%%/*}/fds"; sleep 20 & [ $CNI_COMMAND != ADD ] || echo '{"cniVersion":"1.1.0","ips":[{"address":"%s/25"}]}'`, r.free(83)))
		out := r.run(c)
		if out.took > 6*time.Second {
			r.Errorf("took %s", out.took)
		}
		fds, err := os.ReadFile(filepath.Join(dir, "fds"))
		must(r, err)
		for _, ours := range []string{"/ipam/", "/run/netns/", "net:[", "socket:["} {
			if strings.Contains(string(fds), ours) {
				r.Errorf("a delegate has %s", fds)
			}
		}
		r.ok(c.as("DEL"))
		r.gone(c)
	}},
}

// networkFile makes a configuration directory with a network file like the one
// the agent writes, for the rig's program.
func (r *rig) networkFile(change func(conf map[string]any)) (dir string) {
	r.Helper()
	b, err := os.ReadFile(filepath.Join(r.UCRConfDir, "v4.conf"))
	must(r, err)
	var conf map[string]any
	must(r, json.Unmarshal(b, &conf))
	conf["type"] = r.p.name
	if change != nil {
		change(conf)
	}
	b, err = json.Marshal(conf)
	must(r, err)
	dir = r.TempDir()
	must(r, os.WriteFile(filepath.Join(dir, "v4.conf"), b, 0o644))
	return dir
}

// isolator is Mesos' on the rig's host. Its root is on the host's own mounts.
func (r *rig) isolator(confDir string) *ucr.Isolator {
	return &ucr.Isolator{ConfDir: confDir, PluginsDir: binDir, Root: r.TempDir(), Command: r.command}
}
