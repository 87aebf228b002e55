package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"overlayd.internal/overlay/integration/lab/ucr"
)

// TestUCR launches containers as Mesos does, through the files the agent wrote.
func TestUCR(t *testing.T) {
	h := newHost(t)
	mesos := programs[0]

	t.Run("start-up checks", func(t *testing.T) {
		r := newRig(t, h, mesos)
		iso := r.isolator(r.UCRConfDir)
		files, skipped, err := iso.Networks()
		must(t, err)
		if len(skipped) > 0 {
			t.Errorf("Mesos would skip: %v", skipped)
		}
		if len(files) != strings.Count(cluster, "{name:") {
			t.Errorf("networks: %v", files)
		}
		for name, file := range files {
			b, err := os.ReadFile(file)
			must(t, err)
			var conf map[string]any
			must(t, json.Unmarshal(b, &conf))
			if filepath.Base(file) != name+".conf" || conf["type"] != "m-overlay" || conf["cniVersion"] != nil {
				t.Errorf("%s: %s", file, b)
			}
		}
	})

	t.Run("several networks at once", func(t *testing.T) {
		r := newRig(t, h, mesos)
		ctx := context.Background()
		iso, id, netns := r.isolator(r.UCRConfDir), r.newID()+".nested.0", r.netns()
		must(t, iso.Isolate(ctx, id, netns.Path))
		results, err := iso.Attach(ctx, id, ucr.NetworkInfo{Name: "dual"}, ucr.NetworkInfo{Name: "v4"}, ucr.NetworkInfo{Name: "v6"})
		must(t, err)
		if links := r.linksIn(netns.Path); !slices.Equal(slices.Sorted(slices.Values(links)), []string{"eth0", "eth1", "eth2", "lo"}) {
			t.Errorf("links: %q", links)
		}
		dual, v4, v6 := results[0], results[1], results[2]
		if dual.IP4 == nil || dual.IP6 == nil || v4.IP4 == nil || v4.IP6 != nil || v6.IP4 != nil || v6.IP6 == nil {
			t.Errorf("results: %+v", results)
		}
		for _, gateway := range []string{dual.IP4.Gateway, dual.IP6.Gateway, v4.IP4.Gateway, v6.IP6.Gateway} {
			if _, err := netns.Ping(ctx, netip.MustParseAddr(gateway), 1); err != nil {
				t.Error(err)
			}
		}
		must(t, iso.Detach(ctx, id))
		r.gone(call{id: id, netns: netns.Path})
	})

	t.Run("static request", func(t *testing.T) {
		r := newRig(t, h, mesos)
		ctx := context.Background()
		iso := r.isolator(r.UCRConfDir)
		want := r.free(40)
		first, second := r.newID(), r.newID()
		for _, id := range []string{first, second} {
			must(t, iso.Isolate(ctx, id, r.netns().Path))
		}
		results, err := iso.Attach(ctx, first, ucr.NetworkInfo{Name: "v4", Addresses: []string{want.String()}})
		must(t, err)
		if results[0].IP4.Prefix().Addr() != want {
			t.Errorf("got %s, want %s", results[0].IP4.IP, want)
		}
		for address, reason := range map[string]string{want.String(): "is in use by v4/" + first, "9.0.0.1": "is the gateway", "9.0.9.9": "is outside", "x": "want 9.0.1.5"} {
			_, err := iso.Attach(ctx, second, ucr.NetworkInfo{Name: "v4", Addresses: []string{address}})
			if err == nil || !strings.Contains(err.Error(), reason) {
				t.Errorf("%s: %v; want %q", address, err, reason)
			}
			must(t, iso.Del(ctx, second))
		}
		must(t, iso.Detach(ctx, second))
		must(t, iso.Detach(ctx, first))
	})

	t.Run("the reason reaches the framework", func(t *testing.T) {
		r := newRig(t, h, mesos)
		ctx := context.Background()
		iso := r.isolator(r.UCRConfDir)
		ids := []string{r.newID(), r.newID()}
		for i, id := range ids {
			must(t, iso.Isolate(ctx, id, r.netns().Path))
			_, err := iso.Attach(ctx, id, ucr.NetworkInfo{Name: "tiny"})
			if i == 0 {
				must(t, err)
			} else if err == nil || !strings.Contains(err.Error(), "overlay tiny: no address left in the mesos half 10.2.0.0/30: 1 used, 0 cooling, 1 in all") {
				t.Errorf("exhausted: %v", err)
			}
		}
		for _, id := range ids {
			must(t, iso.Detach(ctx, id))
		}
	})

	t.Run("behind the port mapper", func(t *testing.T) {
		r := newRig(t, h, mesos)
		ctx := context.Background()
		dir := r.TempDir()
		conf := map[string]any{
			"name": "v4", "type": "mesos-cni-port-mapper", "chain": "UCR-TEST", "excludeDevices": []any{"m-v4"},
			"delegate": map[string]any{"type": "m-overlay", "runDir": r.RunDir, "hostPorts": false},
		}
		b, err := json.Marshal(conf)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, "v4.conf"), b, 0o644))
		iso, id, netns := r.isolator(dir), r.newID(), r.netns()
		// The delegate sees the ports too. It leaves them alone: portmap is not even there.
		must(t, iso.Isolate(ctx, id, netns.Path))
		results, err := iso.Attach(ctx, id, ucr.NetworkInfo{Name: "v4", PortMappings: []ucr.PortMapping{{HostPort: 31005, ContainerPort: 80}}})
		must(t, err)
		ip := results[0].IP4.Prefix().Addr()
		if rules := r.sh(t, `iptables -t nat -S UCR-TEST`); !strings.Contains(rules, fmt.Sprintf("--to-destination %s:80", ip)) {
			t.Errorf("rules: %s", rules)
		}
		if _, err := netns.Ping(ctx, netip.MustParseAddr(results[0].IP4.Gateway), 1); err != nil {
			t.Error(err)
		}
		must(t, iso.Forget(ctx, id))
		must(t, iso.Detach(ctx, id))
		if rules := r.sh(t, `iptables -t nat -S UCR-TEST`); strings.Contains(rules, "DNAT") {
			t.Errorf("left: %s", rules)
		}
		r.gone(call{id: id, netns: netns.Path})
	})

	t.Run("agent's host reaches the container", func(t *testing.T) {
		r := newRig(t, h, mesos)
		ctx := context.Background()
		iso, id := r.isolator(r.UCRConfDir), r.newID()
		must(t, iso.Isolate(ctx, id, r.netns().Path))
		results, err := iso.Attach(ctx, id, ucr.NetworkInfo{Name: "v4"})
		must(t, err)
		if _, err := h.Ping(ctx, results[0].IP4.Prefix().Addr(), 1); err != nil {
			t.Error(err)
		}
		must(t, iso.Detach(ctx, id))
	})
}
