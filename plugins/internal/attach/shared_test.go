package attach

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/ipam"
)

// newShared is a machine with one more overlay, whose halves share a pool of 29
// addresses: one, 9.3.0.0/27.
func newShared(t *testing.T) *machine {
	t.Helper()
	m := newMachine(t)
	p := netip.MustParsePrefix
	lease := conf.Lease{Bridges: conf.Halves[:], Grants: []conf.Grant{{
		Overlay: conf.Overlay{Name: "one", Subnet: p("9.3.0.0/16"), Prefix: 27, Halves: conf.HalvesShared},
		Subnet:  p("9.3.0.0/27"),
	}}}
	m.state.Overlays = append(m.state.Overlays, lease.AgentOverlays(map[string]conf.OverlayStatus{"one": {Status: conf.StatusOK}})...)
	m.publish()
	m.host.addBridge(t, "m-one", testMTU, p("9.3.0.1/27"))
	return m
}

// ways are the programs that draw from a shared pool.
var ways = []string{"m-overlay", "d-overlay", "overlay-ipam"}

// one is a call about overlay one.
func (m *machine) one(plugin, command, id, netns string) call {
	c := call{plugin: plugin, command: command, id: id, netns: netns, conf: m.config("one", "1.1.0", "type", plugin)}
	if plugin == "overlay-ipam" {
		c.conf["ipam"] = map[string]any{"type": plugin, "half": "docker"}
	}
	return c
}

// TestSharedPool: the programs of both halves attach at once in one pool. No address
// is given out twice, and all of them are; then each is refused, and all comes back.
func TestSharedPool(t *testing.T) {
	m := newShared(t)
	const n = 29
	var containers [n + 1]namespace
	for i := range containers {
		containers[i] = newNamespace(t)
	}
	var mu sync.Mutex
	owner, results := map[netip.Addr]string{}, [n]*types100.Result{}
	call := func(command string, i int) call {
		return m.one(ways[i%len(ways)], command, fmt.Sprintf("c%d", i), containers[i].path)
	}
	each := func(f func(i int)) {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { f(i) })
		}
		wg.Wait()
	}
	each(func(i int) {
		c := call("ADD", i)
		out := m.exec(c)
		var r types100.Result
		if err := json.Unmarshal([]byte(out.stdout), &r); err != nil || out.status != 0 {
			t.Errorf("%s ADD %d: exit %d: %s%s", c.plugin, i, out.status, out.stdout, out.stderr)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		for _, ip := range r.IPs {
			a := addrOf(ip.Address.IP)
			if other := owner[a]; other != "" {
				t.Errorf("%s is given to %s and to %s", a, other, c.id)
			}
			owner[a], results[i] = c.id, &r
			if gateway := addrOf(ip.Gateway); gateway != netip.MustParseAddr("9.3.0.1") {
				t.Errorf("%s has gateway %s", c.id, gateway)
			}
		}
	})
	if t.Failed() || len(owner) != n {
		t.Fatalf("%d addresses were given out, want %d", len(owner), n)
	}
	ping(t, containers[0], addrsOf(results[1])[0])
	ping(t, containers[1], addrsOf(results[0])[0])
	for _, plugin := range ways {
		m.refused(m.one(plugin, "ADD", "late", containers[n].path), types.ErrTryAgainLater,
			"overlay one: no address left in the shared pool 9.3.0.0/27: 29 used, 0 cooling, 29 in all")
		m.refused(m.one(plugin, "STATUS", "", ""), types.ErrPluginNotAvailable, "no address left in the shared pool")
	}
	for i := range 2 {
		c := call("CHECK", i)
		c.conf["prevResult"] = results[i]
		m.ok(c)
	}
	each(func(i int) {
		if out := m.exec(call("DEL", i)); out.status != 0 {
			t.Errorf("DEL %d: exit %d: %s%s", i, out.status, out.stdout, out.stderr)
		}
	})
	m.wantNothing(containers[:]...)
}

// TestSharedAttachment: in a shared pool an attachment has one address. A program may
// not take it for another container while the other one's has it, and DEL of either
// gives it back.
func TestSharedAttachment(t *testing.T) {
	m := newShared(t)
	a, b := newNamespace(t), newNamespace(t)
	r := m.add(m.one("m-overlay", "ADD", "same", a.path))
	m.refused(m.one("d-overlay", "ADD", "same", b.path), cni.ErrCodeExists, "the container has it in another network namespace")
	ping(t, a, addrOf(r.IPs[0].Gateway))
	m.ok(m.one("d-overlay", "DEL", "same", ""))
	m.wantNothing(a, b)
}

// TestSharedGC: a runtime knows what it has attached itself, and not what Mesos has.
func TestSharedGC(t *testing.T) {
	for _, by := range []string{"m-overlay", "d-overlay"} {
		t.Run(by, func(t *testing.T) {
			m := newShared(t)
			for _, plugin := range ways[:2] {
				m.add(m.one(plugin, "ADD", plugin, newNamespace(t).path))
				m.age("one", plugin)
			}
			gc := m.one(by, "GC", "", "")
			gc.conf["cni.dev/valid-attachments"] = []map[string]string{}
			m.ok(gc)
			f := m.left()
			if len(f.links) != 1 || len(f.records) != 1 || f.records[0].ContainerID == by {
				t.Errorf("GC of %s left links %v and records %v", by, f.links, f.records)
			}
			if want := map[string]conf.Half{"m-overlay": conf.Docker, "d-overlay": conf.Mesos}[by]; f.records[0].Half != want {
				t.Errorf("the record is of the %s half, want %s", f.records[0].Half, want)
			}
		})
	}
}

// TestSharedRebuild: a store that is made anew knows the addresses of both programs
// for one pool, with and without a document that says so.
func TestSharedRebuild(t *testing.T) {
	for _, without := range []string{filepath.Join(conf.IPAMDir, "one.db"), conf.StateFile} {
		t.Run(filepath.Base(without), func(t *testing.T) {
			m := newShared(t)
			var had []netip.Addr
			for i := range 6 {
				had = append(had, addrsOf(m.add(m.one(ways[i%2], "ADD", fmt.Sprintf("c%d", i), newNamespace(t).path)))...)
			}
			for _, name := range []string{without, filepath.Join(conf.IPAMDir, "one.db")} {
				if err := os.Remove(filepath.Join(m.run, name)); err != nil && !os.IsNotExist(err) {
					t.Fatal(err)
				}
			}
			m.ok(m.one("m-overlay", "DEL", "nobody", "")) // makes the store
			m.publish()
			for i := range 6 {
				got := addrsOf(m.add(m.one(ways[i%2], "ADD", fmt.Sprintf("new%d", i), newNamespace(t).path)))
				if slices.Contains(had, got[0]) {
					t.Errorf("%s is given out again", got[0])
				}
				had = append(had, got...)
			}
			if recs := m.records("one"); len(recs) != 12 {
				t.Errorf("records %v", recs)
			}
		})
	}
}

// TestRebuildBesideDocker: a store that is made anew gives out nothing of a pool while a
// container of Docker is on its bridge whose address nobody has filed. An ADD waits a
// moment for that.
func TestRebuildBesideDocker(t *testing.T) {
	m := newShared(t)
	link, err := m.host.LinkByName("m-one")
	if err != nil {
		t.Fatal(err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = "veth0a1b2c3", link.Attrs().Index // as dockerd names it
	if err := m.host.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}); err != nil {
		t.Fatal(err)
	}
	// An ADD that nothing is filed for has made the store, and waited in vain.
	container := newNamespace(t)
	m.refused(m.one("m-overlay", "ADD", "c1", container.path), types.ErrTryAgainLater, "made anew")
	m.refused(m.one("d-overlay", "STATUS", "", ""), types.ErrPluginNotAvailable, "made anew")

	with := func(f func(*ipam.Store) error) {
		t.Helper()
		store, err := ipam.Open(t.Context(), ipam.Options{Dir: filepath.Join(m.run, conf.IPAMDir), Overlay: "one"})
		if err == nil {
			err = errors.Join(f(store), store.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// What the agent does when dockerd has told.
	ranges := []netip.Prefix{netip.MustParsePrefix("9.3.0.0/27")}
	with(func(s *ipam.Store) error {
		_, err := s.AllocateSingle(t.Context(), ipam.SingleRequest{
			Half: conf.Mesos, By: conf.Docker, Ranges: ranges, From: ranges[0], Want: netip.MustParseAddr("9.3.0.2"),
			Name: func(a netip.Addr) conf.Attachment { return conf.DockerAttachment("one", a) },
		})
		return err
	})
	added := make(chan outcome, 1)
	go func() { added <- m.exec(m.one("m-overlay", "ADD", "c1", container.path)) }()
	select { // of the 5 s that it waits, most are left
	case out := <-added:
		t.Fatalf("ADD does not wait: exit %d: %s%s", out.status, out.stdout, out.stderr)
	case <-time.After(500 * time.Millisecond):
	}
	with(func(s *ipam.Store) error { return s.Filed(t.Context(), []conf.Half{conf.Mesos}) })
	var r types100.Result
	out := <-added
	if err := json.Unmarshal([]byte(out.stdout), &r); err != nil || out.status != 0 {
		t.Fatalf("ADD: exit %d: %s%s", out.status, out.stdout, out.stderr)
	}
	if got := addrsOf(&r); !slices.Equal(got, []netip.Addr{netip.MustParseAddr("9.3.0.3")}) {
		t.Errorf("it has %v, and 9.3.0.2 is that of a container of Docker", got)
	}
}
