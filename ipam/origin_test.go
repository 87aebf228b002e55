package ipam

import (
	"os"
	"slices"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"

	"overlayd.internal/overlay/conf"
)

// TestOrigin: what is said of a container is kept within bounds, goes with its address,
// and is nothing that a program which does not know of it would call damage.
func TestOrigin(t *testing.T) {
	b := newBench(t)
	origin := func(id string, o conf.Origin) {
		r := req(id, small)
		r.Origin = o
		b.get(r)
	}
	kept := func(id string, want conf.Origin) {
		t.Helper()
		b.with(func(s *Store) {
			rec, found, err := s.Get(t.Context(), att(id))
			if err != nil || !found {
				t.Fatal(found, err)
			}
			diff(t, "origin of "+id, rec.Origin, want)
			list, err := s.List(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(list, func(r Record) bool { return r.Attachment == att(id) })
			diff(t, "listed origin of "+id, list[i].Origin, want)
			verify(t, s)
		})
	}
	origin("a", conf.Origin{Runtime: "podman", Name: "web"})
	kept("a", conf.Origin{Runtime: "podman", Name: "web"})
	origin("a", conf.Origin{Runtime: "podman", Name: "renamed"})
	kept("a", conf.Origin{Runtime: "podman", Name: "renamed"})
	origin("a", conf.Origin{})
	kept("a", conf.Origin{})
	origin("b", conf.Origin{Name: "x\x1b[2J" + strings.Repeat("y", 1<<20), Runtime: strings.Repeat("r", 1<<20)})
	kept("b", conf.Origin{Name: "x[2J" + strings.Repeat("y", conf.MaxName-4), Runtime: strings.Repeat("r", conf.MaxName)})
	if st, err := os.Stat(b.file()); err != nil || st.Size() > 1<<20 {
		t.Errorf("the store has %d bytes, %v", st.Size(), err)
	}

	// A program of an earlier release leaves the origin behind with the next release.
	b.with(func(s *Store) {
		if err := s.update(func(tx *bolt.Tx) error {
			h, err := s.half(tx, conf.Mesos)
			if err != nil {
				return err
			}
			key := originKey(att("gone").Key())
			if err := h.put(key, encodeOrigin(conf.Origin{Name: "gone"})); err != nil {
				return err
			}
			return h.flush()
		}); err != nil {
			t.Fatal(err)
		}
		verify(t, s)
	})
	b.release("a")
	b.release("b")
	left := func() (n int) {
		b.with(func(s *Store) {
			verify(t, s)
			if err := s.db.view(func(tx *bolt.Tx) error {
				h, err := s.half(tx, conf.Mesos)
				if err != nil {
					return err
				}
				return h.each([]byte{kindOrigin}, func(_, _ []byte) (bool, error) { n++; return true, nil })
			}); err != nil {
				t.Fatal(err)
			}
		})
		return n
	}
	if n := left(); n != 1 {
		t.Errorf("%d origins are left, want that of the earlier release", n)
	}
	b.o.BootID = "the next boot"
	if n := left(); n != 0 {
		t.Errorf("%d origins are left after a reboot", n)
	}
}
