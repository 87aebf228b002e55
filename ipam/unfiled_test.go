package ipam

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"overlayd.internal/overlay/conf"
)

// TestUnfiled: a file that was made anew beside containers of Docker gives out nothing
// of their pool, and retires none of it, until their addresses are filed. What has
// addresses keeps them, and what Docker asks for by name it gets.
func TestUnfiled(t *testing.T) {
	b := newBench(t)
	b.o.Rebuild = func(context.Context) (Known, error) {
		return Known{
			Records: []Record{{Attachment: att("a"), Half: conf.Mesos, Addrs: addrs("9.0.1.2")}},
			Unfiled: []conf.Half{conf.Mesos},
		}, nil
	}
	diff(t, "existing", b.get(req("a", small)).Existing, true)
	for _, r := range []Request{req("b", small), req("b", small, "9.0.1.4")} {
		if _, err := b.allocate(r); !errors.Is(err, ErrUnfiled) {
			t.Errorf("%v: %v, want ErrUnfiled", r.Want, err)
		}
	}
	other := prefixes("9.0.2.0/29")
	of := func(half conf.Half) SingleRequest {
		return SingleRequest{Half: half, Ranges: small, From: small[0], Name: func(a netip.Addr) conf.Attachment { return conf.DockerAttachment("dcos", a) }}
	}
	single := func(r SingleRequest) (a Allocation, err error) {
		b.with(func(s *Store) { a, err = s.AllocateSingle(t.Context(), r) })
		return a, err
	}
	if _, err := single(of(conf.Mesos)); !errors.Is(err, ErrUnfiled) {
		t.Errorf("Docker gets any: %v, want ErrUnfiled", err)
	}
	named := of(conf.Mesos)
	named.Want = addrs("9.0.1.3")[0]
	if _, err := single(named); err != nil {
		t.Error(err)
	}
	if _, err := single(of(conf.Docker)); err != nil {
		t.Errorf("the other pool: %v", err)
	}
	retire := func() (retired bool) {
		b.with(func(s *Store) {
			var err error
			if retired, err = s.Retire(t.Context(), map[conf.Half][]netip.Prefix{conf.Mesos: other}); err != nil {
				t.Fatal(err)
			}
		})
		return retired
	}
	if retire() {
		t.Error("a block is retired that Docker may have addresses of")
	}
	b.with(func(s *Store) {
		unfiled, err := s.Unfiled(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		diff(t, "unfiled", unfiled, []conf.Half{conf.Mesos})
		if err := s.Filed(t.Context(), unfiled); err != nil {
			t.Fatal(err)
		}
	})
	diff(t, "then", b.get(req("b", small)).Addrs, addrs("9.0.1.5")) // .4 is in the other pool
	if !retire() {
		t.Error("the other block stays")
	}

	// Containers do not survive a reboot, those of Docker neither.
	b.o.Overlay = "dcos2"
	b.with(func(*Store) {})
	b.o.BootID = "boot-2"
	b.get(req("b", small))
}
