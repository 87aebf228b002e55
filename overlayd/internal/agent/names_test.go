package agent

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/runtimes/docker"
)

// What a CNI program has left of a container is listed and found at the coordinator,
// whatever its name is.
func TestInventoryNames(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	attach := func(id string, o conf.Origin) {
		h.withStore("dcos", func(s *ipam.Store) {
			_, err := s.Allocate(t.Context(), ipam.Request{Attachment: containerAttachment(id), Half: conf.Docker, Ranges: []netip.Prefix{prefix("9.0.0.128/25")}, Origin: o})
			must(t, err)
		})
	}
	attach("aaaa", conf.Origin{Runtime: conf.RuntimePodman, Name: "Web-1"})
	attach("bbbb", conf.Origin{Runtime: conf.RuntimeContainerd, Name: "prod/" + strings.Repeat("x", 1<<20)})
	attach("cccc", conf.Origin{Name: "<script>\x1b[2J\u202e"})
	attach("dddd", conf.Origin{})
	c.listed(10*time.Second, 4)
	for _, tt := range []struct{ query, id, runtime, name string }{
		{"eb-", "aaaa", conf.RuntimePodman, "Web-1"},
		{"prod/xx", "bbbb", conf.RuntimeContainerd, "prod/" + strings.Repeat("x", conf.MaxName-5)},
		{"<script", "cccc", "", "<script>[2J"},
		{"dddd", "dddd", "", ""},
	} {
		got := c.listed(10*time.Second, 1, "q", tt.query).Containers[0]
		if got.ID != tt.id || got.Runtime != tt.runtime || got.Name != tt.name {
			t.Errorf("%s: %q %q %q", tt.query, got.ID, got.Runtime, got.Name)
		}
	}
	attach("aaaa", conf.Origin{Runtime: conf.RuntimePodman, Name: "renamed"})
	c.listed(10*time.Second, 1, "q", "renamed")
	h.detach("aaaa")
	c.listed(10*time.Second, 0, "q", "renamed")
}

// A container of Docker is told under its id and name, as one, as soon as Docker has
// said whose the addresses are, and under an address where Docker does not.
func TestInventoryOfDocker(t *testing.T) {
	id := strings.Repeat("ab", 32)
	v4, v6, other := netip.MustParseAddr("9.0.0.130"), netip.MustParseAddr("fd01::82"), netip.MustParseAddr("9.0.0.131")
	var known map[netip.Addr]docker.Container
	asked := func() time.Duration { return conf.Boottime() }
	v := &inventory{docker: func() (map[netip.Addr]docker.Container, time.Duration) { return known, asked() }}
	records := func(age time.Duration) (out []api.Attachment) {
		all := map[string]api.Attachment{}
		v.unnamed = false
		for _, a := range []netip.Addr{v6, v4, other} {
			v.put(all, "dcos", ipam.Record{Attachment: conf.DockerAttachment("dcos", a), Half: conf.Docker, Addrs: []netip.Addr{a}, Since: conf.Boottime() - age})
		}
		for _, a := range all {
			if a.Runtime != conf.RuntimeDocker || a.Overlay != "dcos" || a.Half != conf.Docker {
				t.Errorf("%+v", a)
			}
			out = append(out, a)
		}
		slices.SortFunc(out, func(a, b api.Attachment) int { return a.Addresses[0].Compare(b.Addresses[0]) })
		return out
	}
	if got := records(time.Second); len(got) != 0 || !v.unnamed {
		t.Errorf("before Docker has said anything: %+v", got)
	}
	if got := records(time.Minute); len(got) != 3 || got[0].ID != v4.String() || got[0].Name != "" || v.unnamed {
		t.Errorf("Docker says nothing: %+v", got)
	}
	known = map[netip.Addr]docker.Container{v4: {ID: id, Name: "web"}, v6: {ID: id, Name: "web"}}
	if got := records(time.Second); len(got) != 1 || got[0].ID != id || got[0].Name != "web" || !slices.Equal(got[0].Addresses, []netip.Addr{v4, v6}) || !v.unnamed {
		t.Errorf("one is known: %+v", got)
	}
	if got := records(time.Minute); len(got) != 2 || got[1].ID != other.String() {
		t.Errorf("the other is never known: %+v", got)
	}
	// Who had the addresses before is not who has them.
	asked = func() time.Duration { return conf.Boottime() - 2*time.Minute }
	if got := records(time.Second); len(got) != 0 || !v.unnamed {
		t.Errorf("asked before these were given out: %+v", got)
	}
	if got := records(time.Minute); len(got) != 3 || got[0].ID != v4.String() || got[0].Name != "" || v.unnamed {
		t.Errorf("Docker is not to be asked since: %+v", got)
	}
	v.docker = nil
	if got := records(time.Second); len(got) != 3 || v.unnamed {
		t.Errorf("without Docker: %+v", got)
	}
}
