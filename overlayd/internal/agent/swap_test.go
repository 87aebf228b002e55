package agent

import (
	"net/netip"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
)

// A host that gets the address which another one had until now, as when two
// exchange theirs after a power cut, is itself there within seconds: it sends
// from that address, so the other has it no longer. What the other had may be
// taken by that in turn.
func TestAddressOfAnotherHost(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.opts.IP = netip.Addr{}
	routeFrom(t, "172.17.0.6")
	h.start()
	h.ready()
	before := h.document()
	c.join("other", "172.17.0.9") // and was alive just now
	begun := time.Now()
	routeFrom(t, "172.17.0.9")
	ipCmd(t, "addr del "+before.IP.String()+"/24 dev u0")
	h.published("the other's address", func(s conf.State) bool { return s.IP == addr("172.17.0.9") && s.Lease.Error == "" })
	eventually(t, "the coordinator has it", func() error { return agentAt(c, h.id(), "172.17.0.9") })
	swapped := c.join("other", before.IP.String())
	c.join("third", "172.17.0.8")
	eventually(t, "peers are followed from there", func() error { return hasRoute(prefix("9.0.2.0/24")) })
	eventually(t, "and the other is one", func() error { return hasRoute(swapped.Grants[0].Subnet) })
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("whole after %s, want 5 s at most", took)
	}
	if got := h.document().Overlays[0].Subnet; got != before.Overlays[0].Subnet {
		t.Errorf("subnet %s, want %s as before", got, before.Overlays[0].Subnet)
	}
}
