package docker

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
)

// A container is known soon after it has got an address, not only after the next look at
// all addresses, and endpoints that are no containers are none.
func TestContainers(t *testing.T) {
	h := newHost(t)
	h.timing.look = time.Hour
	h.timing.names = 20 * time.Millisecond
	changed := make(chan struct{}, 100)
	h.o.ContainersChanged = func() { changed <- struct{}{} }
	known := func() map[netip.Addr]Container { k, _ := h.Containers(); return k }
	if known() != nil {
		t.Error("containers are known before anybody was asked")
	}
	h.run()
	h.Set(leased(conf.Halves[:]...), 1450)
	h.engine.start()
	eventually(t, "networks", h.engine.names, []string{"both", "dcos", "dcos6"})
	eventually(t, "the first look", func() bool { return known() != nil }, true)
	<-changed

	id, other := strings.Repeat("0a", 32), strings.Repeat("0b", 32)
	attach := func(containers map[string]endpoint) {
		h.engine.change(func() {
			n := h.engine.networks["dcos-id"]
			n.Containers = containers
			h.engine.networks["dcos-id"] = n
		})
		h.engine.tell(`{"Type":"network","Action":"connect"}`)
	}
	web := endpoint{Name: "web", IPv4Address: "9.0.1.130/25"}
	attach(map[string]endpoint{
		id: web, "ep-1": {Name: "gateway", IPv4Address: "9.0.1.131/25"},
		other: {Name: "\x1b[2J" + strings.Repeat("x", 1<<16), IPv4Address: "9.0.1.132/25", IPv6Address: "not one"},
	})
	first, third := netip.MustParseAddr("9.0.1.130"), netip.MustParseAddr("9.0.1.132")
	eventually(t, "both containers", known, map[netip.Addr]Container{
		first: {id, "web"}, third: {other, "[2J" + strings.Repeat("x", conf.MaxName-3)},
	})
	<-changed
	// What is known was asked after the last change of it, and says so also where it is the same.
	_, before := h.Containers()
	attach(map[string]endpoint{id: web})
	eventually(t, "the one that is left", known, map[netip.Addr]Container{first: {id, "web"}})
	_, asked := h.Containers()
	if asked <= before || asked > conf.Boottime() {
		t.Errorf("asked at %s, and before at %s", asked, before)
	}
	attach(map[string]endpoint{id: web})
	eventually(t, "asked again", func() bool { _, again := h.Containers(); return again > asked }, true)

	// While dockerd is away what was known stays.
	h.engine.stop()
	eventually(t, "noticed", func() bool { return strings.Contains(h.log.String(), "dockerd has gone") }, true)
	if len(known()) != 1 {
		t.Errorf("without dockerd: %v", known())
	}
}
