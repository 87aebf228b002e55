package agent

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/conf"
)

// A half that the host no longer has, with a container left in it, is no reason
// to refuse containers in the other.
func TestContainerLeftInUnwantedHalf(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.tune = func(t *timing) { t.resync = 200 * time.Millisecond }
	h.start()
	h.ready()
	bridge, err := netlink.LinkByName("m-dcos")
	must(t, err)
	port := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "host-end", MasterIndex: bridge.Attrs().Index}, PeerName: "container"}
	must(t, netlink.LinkAdd(port))

	h.stop()
	h.opts.Bridges = []conf.Half{conf.Docker}
	h.start()
	h.published("the overlay without the Mesos half is fine", func(s conf.State) bool {
		o, ok := s.Overlay("dcos")
		return ok && o.MesosBridge == nil && o.DockerBridge != nil && o.State.Status == conf.StatusOK
	})
	h.ready() // the document is on disk a moment before it is served
	h.statusAt("so it is for the coordinator", allOK)
	h.metrics(`overlay_agent_overlay_ok{overlay="dcos"} 1`)
	if noLink("m-dcos") == nil {
		t.Error("the bridge was taken from under the container")
	}
	if text := "bridge m-dcos of overlay dcos is no longer wanted but has 1 ports"; strings.Count(h.log.String(), text) != 1 {
		t.Errorf("the log does not say once: %s", text)
	}

	must(t, netlink.LinkDel(port))
	eventually(t, "the bridge goes with its last container", func() error { return noLink("m-dcos") })
}

// One host that joins with an address of the other family is cut off itself; it
// does not stop the others.
func TestPeerOfTheOtherFamily(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	good := c.join("good", "172.17.0.2")
	c.join("odd", "fd00::5")
	h := newHost(c)
	h.start()
	h.ready()
	eventually(t, "the good peer is forwarded to", func() error { return hasRoute(good.Grants[0].Subnet) })
	h.statusAt("all is well", allOK)
	h.metrics(`overlay_agent_peers 1`)
	if !strings.Contains(h.log.String(), "peer odd at fd00::5 cannot be reached from agent IP 172.17.0.4") {
		t.Error("nothing was logged")
	}

	c.join("later", "fd00::6")
	late := c.join("last", "172.17.0.5")
	eventually(t, "peers that come later are forwarded to", func() error {
		return errors.Join(hasRoute(late.Grants[0].Subnet), h.lines(`overlay_agent_peers 2`))
	})
	if s := h.document(); s.Overlays[0].State.Status != conf.StatusOK {
		t.Errorf("published is %+v", s.Overlays[0].State)
	}
}
