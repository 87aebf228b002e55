package agent

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// A machine that was copied with all its directories starts at another address
// while the original is connected. It attaches nobody, and says why; also where
// it has a published document that says otherwise.
func TestClonedMachine(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.opts.IP = addr("172.17.0.9") // which the copy does not have
	h.start()
	h.ready()
	h.stop()
	lease := c.join(h.id(), "172.17.0.9")
	follow(t, c, lease) // the original goes on
	for _, name := range []string{"m-dcos", "d-dcos", "m-dcos6", "d-dcos6", conf.VTEPName} {
		l, err := netlink.LinkByName(name)
		must(t, err)
		must(t, netlink.LinkDel(l))
	}
	ipCmd(t, "addr del 172.17.0.9/24 dev u0")

	h.opts.IP = addr("172.17.0.8")
	h.renew = 50 * time.Millisecond
	h.start()
	h.notReady("is in use by the host at 172.17.0.9")
	if s := h.document(); !strings.Contains(s.Lease.Lost, "is in use by the host at 172.17.0.9") {
		t.Errorf("the plugins may attach: %+v", s.Lease)
	}
	if err := noLink("d-dcos"); err != nil {
		t.Errorf("the original's subnet is set up: %v", err)
	}
	wait(t, 300*time.Millisecond) // several more refusals
	h.notReady("is in use by the host at 172.17.0.9")

	// Without the copied directories it is a host like any other.
	h.stop()
	must(t, errors.Join(os.RemoveAll(h.opts.StateDir), os.RemoveAll(h.opts.RunDir)))
	h.start()
	h.ready()
	if got := h.document().Overlays[0].Subnet; got != prefix("9.0.1.0/24") {
		t.Errorf("subnet %s, want one of its own", got)
	}
}

// A host that was moved to another address while the coordinator is away is not
// kept from its lease by that.
func TestMovedWithoutCoordinator(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.opts.IP = addr("172.17.0.9")
	h.start()
	h.ready()
	h.stop()
	c.stop()
	ipCmd(t, "addr del 172.17.0.9/24 dev u0")
	h.opts.IP = addr("172.17.0.8")
	h.start()
	h.ready()
	eventually(t, "the bridge", func() error { return hasAddr("d-dcos", "9.0.0.129/25") })
}

// Two coordinators that do not share a store: when the first ends, the host does
// not move over to the other's subnets. It says so, takes nothing there, and
// goes on when its own is back.
func TestCoordinatorOfAnotherCluster(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	network := seedNetwork()
	network.Overlays[0].Subnet = prefix("10.0.0.0/8")
	other := &cluster{t: t, remote: c.remote, dir: t.TempDir(), Network: network}
	other.start()
	t.Cleanup(func() { other.stop() })
	h := newHost(c)
	h.renew = 50 * time.Millisecond
	h.tune = func(t *timing) { t.otherCluster, t.home = 50*time.Millisecond, 100*time.Millisecond }
	h.start()
	h.ready()
	before := h.document()
	h.stop()

	h.opts.CoordinatorURLs = append(c.urls(), other.urls()...)
	client, err := api.NewClient(h.opts.CoordinatorURLs, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}})
	must(t, err)
	h.opts.Coordinator = client
	h.start()
	h.ready()
	c.stop()
	s := h.published("the other cluster is named", func(s conf.State) bool { return strings.Contains(s.Lease.Error, "is of cluster") })
	theirs := other.join("witness", "172.17.0.5")
	for _, want := range []string{theirs.ClusterID, "teardown"} {
		if !strings.Contains(s.Lease.Error, want) {
			t.Errorf("the error does not say %s: %s", want, s.Lease.Error)
		}
	}
	if s.Overlays[0].Subnet != before.Overlays[0].Subnet || s.Lease.Epoch != before.Lease.Epoch {
		t.Errorf("it moved to %s", s.Overlays[0].Subnet)
	}
	h.ready() // the lease holds
	if err := errors.Join(hasAddr("d-dcos", "9.0.0.129/25"), agentAt(other, "witness", "172.17.0.5")); err != nil {
		t.Error(err)
	}
	if agentAt(other, h.id(), "172.17.0.4") == nil {
		t.Error("it has a lease of the other cluster")
	}
	c.start()
	h.published("its own coordinator is back", func(s conf.State) bool { return s.Lease.Error == "" })
	c.join("peer", "172.17.0.6")
	eventually(t, "peers are followed there", func() error { return hasRoute(prefix("9.0.1.0/24")) })

	// On purpose: without the stored lease.
	h.stop()
	c.stop()
	must(t, errors.Join(os.Remove(filepath.Join(h.opts.StateDir, leaseFile)), os.Remove(filepath.Join(h.opts.StateDir, peersFile))))
	h.start()
	h.published("it has moved over", func(s conf.State) bool {
		return len(s.Overlays) > 0 && s.Overlays[0].Subnet.Overlaps(prefix("10.0.0.0/8"))
	})
	h.stop()
}
