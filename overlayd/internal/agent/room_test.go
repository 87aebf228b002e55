package agent

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// TestBlockOfGoneFamily: a block goes back whole, also the part of a family that the
// overlay has lost and the host is no longer told of. So it stays as long as an address
// of that family is in use or cooling.
func TestBlockOfGoneFamily(t *testing.T) {
	p := netip.MustParsePrefix
	grant := conf.Grant{
		Overlay: conf.Overlay{Name: "a", Subnet: p("9.0.0.0/8"), Prefix: 24, Subnet6: p("fd01:b::/64"), Prefix6: 80},
		Subnet:  p("9.0.0.0/24"), Subnet6: p("fd01:b::/80"),
		Blocks: []conf.Block{{Subnet: p("9.0.1.0/24"), Subnet6: p("fd01:b:0:0:1::/80")}},
	}
	overlay := func() conf.AgentOverlay {
		return conf.Lease{Bridges: []conf.Half{conf.Mesos, conf.Docker}, Grants: []conf.Grant{grant}}.AgentOverlays(nil)[0]
	}
	clock := time.Hour
	r := &room{dir: t.TempDir(), cooling: time.Minute, now: func() time.Duration { return clock }, empty: map[ownBlock]time.Duration{}, log: slog.New(slog.DiscardHandler)}
	change := func(f func(s *ipam.Store) error) {
		t.Helper()
		if err := r.change(t.Context(), "a", f); err != nil {
			t.Fatal(err)
		}
	}
	att := conf.Attachment{Network: "a", ContainerID: "c", IfName: "eth0"}
	six := overlay().Parts(grant.Blocks[0])[conf.Docker][1:]
	change(func(s *ipam.Store) error {
		_, err := s.Allocate(t.Context(), ipam.Request{Attachment: att, Half: conf.Docker, Ranges: six})
		return err
	})
	grant.Overlay.Subnet6, grant.Overlay.Prefix6, grant.Subnet6, grant.Blocks[0].Subnet6 = netip.Prefix{}, 0, netip.Prefix{}, netip.Prefix{}
	retired := func(when string, want int) {
		t.Helper()
		o := overlay()
		s, err := ipam.TakeSnapshot(t.Context(), r.store("a"))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		u, err := r.use(t.Context(), s, o)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := r.retire(t.Context(), o, u); err != nil || len(got) != want {
			t.Errorf("%s: retired %v, %v; want %d", when, got, err, want)
		}
	}
	retired("in use", 0)
	change(func(s *ipam.Store) error {
		_, err := s.Release(t.Context(), att)
		return err
	})
	retired("cooling", 0)
	clock += time.Minute
	retired("empty", 1)
}
