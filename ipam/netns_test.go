package ipam

import (
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/netns"
)

// TestAllocateAgain: an attachment that asks again is as young as a new one, and
// its namespace is the new one.
func TestAllocateAgain(t *testing.T) {
	b := newBench(t)
	ranges := prefixes("9.0.1.0/25")
	r := req("a", ranges)
	r.NetNS = netns.Ref{Path: "/run/netns/a", Inode: 4026531840, Mount: 4026531841}
	b.get(r)
	record := func() (rec Record) {
		b.with(func(s *Store) {
			var err error
			if rec, _, err = s.Get(t.Context(), att("a")); err != nil {
				t.Fatal(err)
			}
		})
		return rec
	}
	want := Record{Attachment: att("a"), Half: conf.Mesos, Addrs: addrs("9.0.1.2"), BootID: "boot-1", Since: b.now, NetNS: r.NetNS}
	diff(t, "record", record(), want)

	b.now += cooling
	r.NetNS.Inode++
	b.get(r)
	want.Since, want.NetNS = b.now, r.NetNS
	diff(t, "asked again", record(), want)

	b.now += cooling
	r.NetNS = netns.Ref{}
	b.get(r)
	want.Since, want.NetNS = b.now, netns.Ref{}
	diff(t, "asked again, with a host end", record(), want)
}
