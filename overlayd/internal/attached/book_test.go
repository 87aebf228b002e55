package attached_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/attached"
)

const most = 100

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// container is what a runtime makes: an id of 64 digits, a name of 19 letters.
func container(host, i int) api.Attachment {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d/%d", host, i))
	return api.Attachment{
		Network: "blue", ID: hex.EncodeToString(sum[:]), IfName: "eth0", Overlay: "blue", Half: conf.Docker,
		Addresses: []netip.Addr{address(host, i)}, Since: 1_790_000_000 + int64(i), Runtime: "containerd", Name: fmt.Sprintf("service-%05d-%05d", host, i),
	}
}

func address(host, i int) netip.Addr {
	return netip.AddrFrom4([4]byte{9, byte(host >> 8), byte(host), byte(i + 130)})
}

func refs(n int) (out []attached.Ref) {
	for i := range n {
		out = append(out, attached.Ref{ID: id(i), IP: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})})
	}
	return out
}

func id(host int) string { return fmt.Sprintf("host-%08d-4a5b-4c6d-8e9f-%012d", host, host) }

func snapshot(host, n int) api.AttachmentReport {
	r := api.AttachmentReport{AgentID: id(host), Instance: fmt.Sprintf("%026d", host), Sequence: 1, Snapshot: true}
	for i := range n {
		r.Put = append(r.Put, container(host, i))
	}
	for _, half := range conf.Halves {
		r.Usage = append(r.Usage, api.HalfUsage{Overlay: "blue", Half: half, Count: api.Count{Total: 125, Used: uint64(n), Free: 125 - uint64(n)},
			Subnet: netip.PrefixFrom(address(host, 0), 25).Masked()})
	}
	return r
}

func list(t *testing.T, b *attached.Book, agents []attached.Ref, q attached.Query) api.Containers {
	t.Helper()
	if q.Limit == 0 {
		q.Limit = 1000
	}
	out, err := b.Search(agents, q)
	must(t, err)
	return out
}

func TestReports(t *testing.T) {
	b := attached.New()
	r := snapshot(1, 3)
	change, err := b.Apply(r, most)
	must(t, err)
	if !change.First || len(change.Attached) != 3 || len(change.Detached) != 0 {
		t.Errorf("the first report: %+v", change)
	}
	if change, err = b.Apply(r, most); err != nil || change.Attached != nil {
		t.Errorf("the same again: %+v, %v", change, err)
	}
	next := api.AttachmentReport{AgentID: r.AgentID, Instance: r.Instance, Sequence: 2, Put: []api.Attachment{container(1, 7)}, Delete: []string{container(1, 0).Key(), "blue/none"}}
	for range 2 { // the second is one whose answer was lost
		_, err = b.Apply(next, most)
		must(t, err)
	}
	got := list(t, b, refs(2), attached.Query{})
	var ids []string
	for _, c := range got.Containers {
		ids = append(ids, c.ID)
	}
	if want := []string{container(1, 1).ID, container(1, 2).ID, container(1, 7).ID}; got.Total != 3 || !slices.Equal(ids, want) {
		t.Errorf("%d: %v, want %v", got.Total, ids, want)
	}
	for _, bad := range []api.AttachmentReport{
		{AgentID: r.AgentID, Instance: r.Instance, Sequence: 5},
		{AgentID: r.AgentID, Instance: r.Instance, Sequence: 1},
		{AgentID: r.AgentID, Instance: "another", Sequence: 3},
		{AgentID: "nobody", Instance: r.Instance, Sequence: 1},
	} {
		if _, err := b.Apply(bad, most); !errors.Is(err, attached.ErrSnapshotWanted) {
			t.Errorf("%+v: %v, want that a snapshot is asked for", bad, err)
		}
	}
	// After a restart the agent tells everything anew.
	r = snapshot(1, 1)
	r.Instance = "another"
	change, err = b.Apply(r, most)
	must(t, err)
	if change.First || len(change.Attached) != 1 || len(change.Detached) != 3 {
		t.Errorf("after a restart: %d attached, %d detached", len(change.Attached), len(change.Detached))
	}
	if _, err := b.Apply(snapshot(1, most+1), most); !errors.Is(err, attached.ErrTooMany) {
		t.Errorf("more than fit: %v", err)
	}
	b.Forget(r.AgentID)
	if b.Len() != 0 || b.Has(r.AgentID) {
		t.Error("it is not forgotten")
	}
}

// TestPacking: what is packed comes out as it went in, whatever it is.
// What an agent says of its host stays until it says something else, or everything
// without it.
func TestHost(t *testing.T) {
	b := attached.New()
	says := func(want *api.Host) {
		t.Helper()
		if got, _ := b.Host(id(0)); !reflect.DeepEqual(got, want) {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	says(nil)
	host := api.Host{MTU: 1450, Datapath: "ebpf", Drift: 3}
	r := snapshot(0, 2)
	r.Host = &host
	_, err := b.Apply(r, most)
	must(t, err)
	says(&api.Host{MTU: 1450, Datapath: "ebpf", Drift: 3})
	host.MTU = 9000 // of the caller; the book has its own
	_, err = b.Apply(api.AttachmentReport{AgentID: id(0), Instance: r.Instance, Sequence: 2, Delete: []string{container(0, 0).Key()}}, most)
	must(t, err)
	says(&api.Host{MTU: 1450, Datapath: "ebpf", Drift: 3})
	_, err = b.Apply(api.AttachmentReport{AgentID: id(0), Instance: r.Instance, Sequence: 3, Host: &api.Host{MTU: 1500, Datapath: "kernel"}}, most)
	must(t, err)
	says(&api.Host{MTU: 1500, Datapath: "kernel"})
	if whole, ok := b.Report(id(0)); !ok || whole.Host == nil || whole.Host.MTU != 1500 {
		t.Errorf("another coordinator is told %+v", whole.Host)
	}
	r = snapshot(0, 1)
	r.Sequence = 4
	_, err = b.Apply(r, most)
	must(t, err)
	says(nil)
}

func TestPacking(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	word := func(n int) string {
		b := make([]byte, rng.IntN(n))
		for i := range b {
			b[i] = byte(rng.IntN(256))
		}
		return string(b)
	}
	for range 300 {
		b := attached.New()
		want := map[string]api.Attachment{}
		r := api.AttachmentReport{AgentID: "a", Instance: word(30), Sequence: rng.Uint64(), Snapshot: true}
		for range rng.IntN(20) {
			a := api.Attachment{Network: word(5), ID: word(80), IfName: word(16), Overlay: word(3), Half: conf.Halves[rng.IntN(2)], Runtime: word(3), Name: word(260), Since: rng.Int64N(1 << 32), Addresses: []netip.Addr{}}
			if rng.IntN(2) == 0 {
				a.ID = hex.EncodeToString([]byte(a.ID))
			}
			for range rng.IntN(5) {
				a.Addresses = append(a.Addresses, netip.AddrFrom4([4]byte{byte(rng.Uint32()), 1, 2, byte(rng.Uint32())}))
			}
			for range rng.IntN(4) {
				a.Addresses = append(a.Addresses, netip.AddrFrom16([16]byte{0: 0xfd, 9: byte(rng.Uint32()), 15: byte(rng.Uint32())}))
			}
			r.Put = append(r.Put, a)
			want[a.Key()] = a
		}
		for _, half := range conf.Halves {
			r.Usage = append(r.Usage, api.HalfUsage{Overlay: word(3), Half: half, Count: api.Count{Total: rng.Uint64(), Used: rng.Uint64N(300), Cooling: 3, Free: 1},
				Subnet: netip.MustParsePrefix("9.1.2.0/25"), Subnet6: netip.MustParsePrefix("fd01::/81")})
		}
		_, err := b.Apply(r, most)
		must(t, err)
		got, ok := b.Report("a")
		if !ok || got.Sequence != r.Sequence || got.Instance != r.Instance || !reflect.DeepEqual(got.Usage, r.Usage) {
			t.Fatalf("got %+v", got)
		}
		if len(got.Put) != len(want) {
			t.Fatalf("%d attachments, want %d", len(got.Put), len(want))
		}
		for _, a := range got.Put {
			if !reflect.DeepEqual(a, want[a.Key()]) {
				t.Fatalf("got %+v, want %+v", a, want[a.Key()])
			}
		}
	}
}

func TestSearch(t *testing.T) {
	b := attached.New()
	const hosts, each = 40, 5
	for h := range hosts {
		r := snapshot(h, each)
		if h == 7 {
			r.Put[2].Name, r.Put[3].ID, r.Put[3].Overlay = "Web-Frontend", "Pod_42", "green"
			r.Put[4].Addresses = append(r.Put[4].Addresses, netip.MustParseAddr("fd01:b::7:1"))
		}
		_, err := b.Apply(r, most)
		must(t, err)
	}
	agents := refs(hosts)
	for _, c := range []struct {
		q    attached.Query
		want int
	}{
		{attached.Query{}, hosts * each},
		{attached.Query{Text: container(9, 3).ID[:12]}, 1},
		{attached.Query{Text: strings.ToUpper(container(9, 3).ID[:11])}, 1},
		{attached.Query{Text: container(9, 3).ID + "0"}, 0},
		{attached.Query{Text: "front"}, 1},
		{attached.Query{Text: "pod_"}, 1},
		{attached.Query{Text: "9.0.7."}, each},
		{attached.Query{Text: "9.0.7.131"}, 1},
		{attached.Query{Text: "fd01:b"}, 1},
		{attached.Query{Text: "gre"}, 1},
		{attached.Query{Text: "blue"}, hosts*each - 1},
		{attached.Query{Overlay: "green"}, 1},
		{attached.Query{Overlay: "blue", Text: "pod_42"}, 0},
		{attached.Query{Text: "service-00011"}, each},
		{attached.Query{Text: "nothing of that name"}, 0},
	} {
		if got := list(t, b, agents, c.q); got.Total != c.want || len(got.Containers) != c.want {
			t.Errorf("%+v: %d of %d, want %d", c.q, len(got.Containers), got.Total, c.want)
		}
	}
	if got := list(t, b, agents[7:8], attached.Query{}); got.Total != each || got.Containers[0].AgentID != id(7) {
		t.Errorf("of one agent: %+v", got)
	}
	if _, err := b.Search(agents, attached.Query{After: "x", Limit: 1}); err == nil {
		t.Error("a place that no page has named is taken")
	}
	total, byAgent := b.Total("blue"), b.AttachedTo("blue")
	if total != hosts*each-1 || byAgent[id(7)] != each-1 || byAgent[id(8)] != each {
		t.Errorf("%d in blue: %v", total, byAgent)
	}
	for _, h := range []int{7, 8} { // totals are kept, not counted
		if h == 8 {
			_, err := b.Apply(api.AttachmentReport{AgentID: id(h), Instance: "other", Sequence: 1, Snapshot: true}, most)
			must(t, err)
		} else {
			b.Forget(id(h))
		}
		total = 0
		for _, n := range b.AttachedTo("blue") {
			total += n
		}
		if got := b.Total("blue"); got != total || b.Total("green") != 0 {
			t.Errorf("%d in blue and %d in green, want %d and none", got, b.Total("green"), total)
		}
	}
}

// TestPages: pages have everything once, also while containers come and go.
func TestPages(t *testing.T) {
	b := attached.New()
	for h := range 10 {
		_, err := b.Apply(snapshot(h, 7), most)
		must(t, err)
	}
	agents := refs(10)
	seen := map[string]int{}
	q := attached.Query{Limit: 4}
	for page := 0; ; page++ {
		got := list(t, b, agents, q)
		for _, c := range got.Containers {
			seen[c.ID]++
		}
		if got.Next == "" {
			break
		}
		if page == 3 { // the last one of the page goes, and one comes before it
			last := got.Containers[len(got.Containers)-1]
			r, _ := b.Report(last.AgentID)
			r.Snapshot, r.Sequence = false, r.Sequence+1
			r.Delete, r.Put = []string{api.Attachment{Network: "blue", ID: last.ID, IfName: "eth0", Overlay: "blue"}.Key()}, nil
			_, err := b.Apply(r, most)
			must(t, err)
		}
		q.After = got.Next
	}
	if len(seen) != 70 {
		t.Errorf("%d containers on all pages, want 70", len(seen))
	}
	for id, n := range seen {
		if n != 1 {
			t.Errorf("%s is on %d pages", id, n)
		}
	}
}

func TestLevels(t *testing.T) {
	b := attached.New()
	r := api.AttachmentReport{AgentID: "a", Instance: "i", Sequence: 1, Snapshot: true}
	report := func(used, cooling uint64) (levels []api.Level) {
		t.Helper()
		r.Usage = []api.HalfUsage{{Overlay: "blue", Half: conf.Mesos, Count: api.Count{Total: 10, Used: used, Cooling: cooling}}}
		change, err := b.Apply(r, most)
		must(t, err)
		for _, u := range change.Levels {
			levels = append(levels, u.Level())
		}
		r.Snapshot, r.Sequence = false, r.Sequence+1
		return levels
	}
	for _, step := range []struct {
		used, cooling uint64
		want          []api.Level
	}{
		{5, 0, nil},
		{7, 0, nil},
		{7, 1, []api.Level{api.LevelWarning}},
		{9, 1, nil}, // the one that cools is taken when nothing else is free
		{10, 0, []api.Level{api.LevelFull}},
		{9, 0, []api.Level{api.LevelWarning}},
		{1, 0, []api.Level{api.LevelOK}},
	} {
		if got := report(step.used, step.cooling); !slices.Equal(got, step.want) {
			t.Errorf("%d used, %d cooling: %v, want %v", step.used, step.cooling, got, step.want)
		}
	}
}

// TestCopies: of what coordinators tell each other the newest counts, in whatever
// order it comes.
func TestCopies(t *testing.T) {
	here, there := attached.New(), attached.New()
	f := there.Follow()
	defer f.Close()
	r := snapshot(1, 2)
	_, err := there.Apply(r, most)
	must(t, err)
	<-f.Changed()
	if got := f.Take(); !slices.Equal(got, []string{r.AgentID}) {
		t.Fatalf("changed: %v", got)
	}
	copied, ok := there.Report(r.AgentID)
	if !ok {
		t.Fatal("there is nothing to copy")
	}
	change, err := here.Copy(copied, "there", r.Instance)
	if must(t, err); len(change.Attached) != 2 {
		t.Errorf("copied: %+v", change)
	}
	if _, ok := here.Report(r.AgentID); ok {
		t.Error("what was copied is told on")
	}
	// The agent moves here and goes on.
	_, err = here.Apply(api.AttachmentReport{AgentID: r.AgentID, Instance: r.Instance, Sequence: 1}, most)
	must(t, err)
	if _, ok := here.Report(r.AgentID); !ok {
		t.Error("an agent that has come here is not told")
	}
	_, err = here.Apply(api.AttachmentReport{AgentID: r.AgentID, Instance: r.Instance, Sequence: 2, Put: []api.Attachment{container(1, 5)}}, most)
	must(t, err)
	if change, err := here.Copy(copied, "there", r.Instance); err != nil || len(change.Detached) != 0 || here.Len() != 3 {
		t.Errorf("an old copy: %+v, %v; %d attachments", change, err, here.Len())
	}
	// It was restarted, and tells another coordinator.
	restarted := snapshot(1, 1)
	restarted.Instance = "later"
	if _, err := here.Copy(restarted, "there", r.Instance); err != nil || here.Len() != 3 {
		t.Errorf("a copy of an instance that is not the registered one: %v; %d attachments", err, here.Len())
	}
	if _, err := here.Copy(restarted, "there", "later"); err != nil || here.Len() != 1 {
		t.Errorf("a copy of the instance that has registered: %v; %d attachments", err, here.Len())
	}
}

// TestMemory: the whole cluster's containers fit in memory. What is measured is
// everything that the book keeps: agents, their usage, names and the map, too.
func TestMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("makes a third of a million containers")
	}
	const agents, each, limit = 16_384, 20, 120
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	b := attached.New()
	for h := range agents {
		_, err := b.Apply(snapshot(h, each), most)
		must(t, err)
	}
	perContainer := float64(heap()-before) / (agents * each)
	list := refs(agents)
	began := time.Now()
	got, err := b.Search(list, attached.Query{Text: "service-12345-00007", Limit: 100})
	must(t, err)
	took := time.Since(began)
	t.Logf("%d agents with %d containers each: %.1f bytes a container; a search through all takes %s", agents, each, perContainer, took.Round(time.Millisecond))
	if got.Total != 1 {
		t.Errorf("found %d", got.Total)
	}
	if perContainer > limit {
		t.Errorf("%.1f bytes a container, want at most %d", perContainer, limit)
	}
	runtime.KeepAlive(b)
}
