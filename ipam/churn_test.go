package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"overlayd.internal/overlay/conf"
)

// An op is one line of the history: somebody got an address, or gave it back.
type op struct {
	addr    netip.Addr
	owner   string
	release bool
}

// ownership is an address as a register: free, or of one owner.
var ownership = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		by := map[netip.Addr][]porcupine.Operation{}
		for _, o := range history {
			a := o.Input.(op).addr
			by[a] = append(by[a], o)
		}
		var out [][]porcupine.Operation
		for _, h := range by {
			out = append(out, h)
		}
		return out
	},
	Init: func() any { return "" },
	Step: func(state, input, _ any) (bool, any) {
		o := input.(op)
		if o.release {
			return state == o.owner, ""
		}
		return state == "", o.owner
	},
}

// 100,000 ADDs and DELs from 50 workers, each with an opening of its own, as
// processes do it. OVERLAY_TEST_CHURN sets another number.
func TestChurn(t *testing.T) {
	total := 100_000
	if testing.Short() {
		total = 5_000
	}
	if s := os.Getenv("OVERLAY_TEST_CHURN"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("OVERLAY_TEST_CHURN: %v", err)
		}
		total = n
	}
	const workers = 50
	// Who opens the store anew at once overtakes those who wait, which no process can;
	// the last of them get their turns when the others are through.
	o := Options{Dir: tempDir(t), Overlay: "dcos", Cooling: cooling, LockTimeout: 10 * time.Minute}
	ranges := prefixes("9.0.1.0/25") // 125 for 50 who hold two: it never runs out
	start := time.Now()
	histories := make([][]porcupine.Operation, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			history, err := churn(t, o, w, total/workers, ranges, start)
			if err != nil {
				t.Errorf("worker %d: %v", w, err)
			}
			histories[w] = history
		})
	}
	wg.Wait()
	var all []porcupine.Operation
	for _, h := range histories {
		all = append(all, h...)
	}
	t.Logf("%d operations in %s", len(all), time.Since(start).Round(time.Millisecond))
	if got := porcupine.CheckOperationsTimeout(ownership, all, time.Minute); got != porcupine.Ok {
		t.Errorf("the history is not linearizable: %v", got)
	}
	s, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	verify(t, s)
	left, err := s.List(t.Context())
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	st, err := os.Stat(s.path)
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() > 1<<20 {
		t.Errorf("the file has grown to %d bytes", st.Size())
	}
}

// churn is one worker: it holds up to two attachments, the older one goes first.
func churn(t *testing.T, o Options, w, n int, ranges []netip.Prefix, start time.Time) (history []porcupine.Operation, err error) {
	type held struct {
		id   string
		addr netip.Addr
	}
	var have []held
	for i := 0; i < n || len(have) > 0; i++ {
		s, err := Open(t.Context(), o)
		if err != nil {
			return history, err
		}
		call := time.Since(start).Nanoseconds()
		var done op
		if i < n && (len(have) == 0 || len(have) == 1 && i%3 == 0) {
			id := fmt.Sprintf("w%d-%d", w, i)
			a, aerr := s.Allocate(t.Context(), Request{Attachment: att(id), Half: conf.Docker, Ranges: ranges})
			if err = aerr; err == nil {
				done = op{addr: a.Addrs[0], owner: id}
				have = append(have, held{id, a.Addrs[0]})
			}
		} else {
			h := have[0]
			have = have[1:]
			_, err = s.Release(t.Context(), att(h.id))
			done = op{addr: h.addr, owner: h.id, release: true}
		}
		ret := time.Since(start).Nanoseconds()
		if err := errors.Join(err, s.Close()); err != nil {
			return history, err
		}
		history = append(history, porcupine.Operation{ClientId: w, Input: done, Call: call, Return: ret})
	}
	return history, nil
}

// The cost of an ADD and a DEL, files opened and closed, must not depend on how
// many addresses are in use.
func BenchmarkAddDel(b *testing.B) {
	for _, used := range []int{0, 100, 1_000, 10_000, 60_000} {
		b.Run(fmt.Sprint("used=", used), func(b *testing.B) {
			o := Options{Dir: tempDir(b), Overlay: "dcos", BootID: "boot", Cooling: cooling}
			ranges := prefixes("9.0.0.0/16")
			fill(b, o, used, ranges)
			for b.Loop() {
				once(b, o, req("x", ranges))
			}
		})
	}
}

func fill(t testing.TB, o Options, n int, ranges []netip.Prefix) {
	s, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range n {
		if _, err := s.Allocate(t.Context(), req(fmt.Sprint("c", i), ranges)); err != nil {
			t.Fatal(err)
		}
	}
}

func once(t testing.TB, o Options, r Request) {
	for _, f := range []func(*Store) error{
		func(s *Store) error { _, err := s.Allocate(t.Context(), r); return err },
		func(s *Store) error { _, err := s.Release(t.Context(), r.Attachment); return err },
	} {
		s, err := Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if err := f(s); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
