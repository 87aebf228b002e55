package coordinator_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// containerOf is the i-th container of an agent, as a runtime makes them.
func containerOf(lease conf.Lease, i int) api.Attachment {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%d", lease.AgentID, i))
	a := api.Attachment{
		Network: "dcos", ID: hex.EncodeToString(sum[:]), IfName: "eth0", Overlay: "dcos", Half: conf.Docker,
		Since: time.Now().Unix(), Runtime: "containerd", Name: fmt.Sprintf("%x-service-%d", sum[:4], i),
	}
	addr := conf.FirstContainer(conf.Docker.Of(lease.Grants[0].Subnet))
	for range i {
		addr = addr.Next()
	}
	a.Addresses = []netip.Addr{addr}
	return a
}

func usageOf(lease conf.Lease, used, cooling uint64) []api.HalfUsage {
	half := conf.Docker.Of(lease.Grants[0].Subnet)
	total := conf.Capacity(half)
	return []api.HalfUsage{{Overlay: "dcos", Half: conf.Docker, Subnet: half, Count: api.Count{Total: total, Used: used, Cooling: cooling, Free: total - used - cooling}}}
}

// reporting is an agent that reports its containers.
type reporting struct {
	t      testing.TB
	client *api.Client
	lease  conf.Lease
	next   api.AttachmentReport // with a sequence of its own
}

func (n *node) reporting(t testing.TB, i int) *reporting {
	t.Helper()
	req := nth(i)
	req.Instance = fmt.Sprintf("instance-%d", i)
	return &reporting{t: t, client: n.client, lease: n.register(t, req), next: api.AttachmentReport{AgentID: req.AgentID, Instance: req.Instance, Snapshot: true}}
}

func (r *reporting) report(put []api.Attachment, gone []string, usage []api.HalfUsage) error {
	r.next.Sequence++
	r.next.Put, r.next.Delete, r.next.Usage = put, gone, usage
	_, err := r.client.ReportAttachments(r.t.Context(), r.next)
	if err == nil {
		r.next.Snapshot = false
	}
	return err
}

func (r *reporting) must(put []api.Attachment, gone []string, usage []api.HalfUsage) {
	r.t.Helper()
	if err := r.report(put, gone, usage); err != nil {
		r.t.Fatal(err)
	}
}

func (n *node) containers(t testing.TB, query ...string) api.Containers {
	t.Helper()
	v := url.Values{}
	for i := 0; i < len(query); i += 2 {
		v.Set(query[i], query[i+1])
	}
	found, err := n.client.Containers(t.Context(), v)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestContainersOfTheCluster(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	one, two := n.reporting(t, 1), n.reporting(t, 2)
	if got := n.containers(t); got.Total != 0 || got.Containers == nil {
		t.Errorf("before anything: %+v", got)
	}
	one.must([]api.Attachment{containerOf(one.lease, 0), containerOf(one.lease, 1)}, nil, usageOf(one.lease, 2, 0))
	two.must([]api.Attachment{containerOf(two.lease, 0)}, nil, usageOf(two.lease, 1, 3))

	want := containerOf(two.lease, 0)
	got := n.containers(t, "q", want.ID[:10])
	if got.Total != 1 || len(got.Containers) != 1 {
		t.Fatalf("by id: %+v", got)
	}
	c := got.Containers[0]
	if c.ID != want.ID || c.Name != want.Name || c.Runtime != want.Runtime || c.Network != want.Network || c.IfName != want.IfName || c.Overlay != want.Overlay || c.Half != want.Half ||
		!slices.Equal(c.Addresses, want.Addresses) || c.AgentID != two.lease.AgentID || c.AgentIP != two.lease.AgentIP || c.Since.Unix() != want.Since {
		t.Errorf("got %+v, want %+v", c, want)
	}
	if got := n.containers(t, "agent", one.lease.AgentIP.String(), "limit", "1"); got.Total != 2 || len(got.Containers) != 1 || got.Next == "" {
		t.Errorf("a page: %+v", got)
	} else if rest := n.containers(t, "agent", one.lease.AgentID, "after", got.Next); len(rest.Containers) != 1 || rest.Next != "" || rest.Containers[0].ID == got.Containers[0].ID {
		t.Errorf("the next page: %+v", rest)
	}
	addresses, err := n.client.Addresses(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	sum := api.Count{Total: 250, Used: 3, Cooling: 3, Free: 244}
	if len(addresses.Overlays) != 1 || addresses.Overlays[0].Count != sum || addresses.Overlays[0].Level != api.LevelOK || len(addresses.Agents) != 2 {
		t.Errorf("addresses: %+v", addresses)
	}

	one.must(nil, []string{containerOf(one.lease, 0).Key()}, usageOf(one.lease, 1, 1))
	if got := n.containers(t); got.Total != 2 {
		t.Errorf("after one has gone: %+v", got)
	}
	// The lease goes, and with it what is known.
	if _, err := n.client.Delete(t.Context(), []string{two.lease.AgentID}); err != nil {
		t.Fatal(err)
	}
	if got := n.containers(t); got.Total != 1 {
		t.Errorf("after an agent has gone: %+v", got)
	}
	refused(t, two.report(nil, nil, nil), http.StatusNotFound, "register first")
}

// TestAddressesOfAnother: an address leads to the host that has it by its lease, also
// where another one reports it: a liar, or one that had it before.
func TestAddressesOfAnother(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	one, two := n.reporting(t, 1), n.reporting(t, 2)
	mine, other := containerOf(one.lease, 0), containerOf(two.lease, 0)
	addr := mine.Addresses[0]
	other.Addresses = append(other.Addresses, addr, netip.MustParseAddr("192.0.2.1")) // and one that nobody has
	one.must([]api.Attachment{mine}, nil, nil)
	two.must([]api.Attachment{other}, nil, nil)
	at := func() (agents []string) {
		for _, c := range n.containers(t, "q", addr.String()).Containers {
			if slices.Contains(c.Addresses, addr) {
				agents = append(agents, c.AgentID)
			}
		}
		return agents
	}
	if got := at(); !slices.Equal(got, []string{one.lease.AgentID}) {
		t.Errorf("%s is at %v", addr, got)
	}
	if got := n.containers(t, "agent", two.lease.AgentID).Containers; len(got) != 1 || len(got[0].Addresses) != 2 {
		t.Errorf("the other one: %+v", got)
	}
	if _, err := n.client.Delete(t.Context(), []string{one.lease.AgentID}); err != nil {
		t.Fatal(err)
	}
	if got := at(); !slices.Equal(got, []string{two.lease.AgentID}) {
		t.Errorf("when nobody has it any more, %s is at %v", addr, got)
	}
}

// TestReportsThatAreWrong: what no agent of ours says is refused, and changes nothing.
func TestReportsThatAreWrong(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	one := n.reporting(t, 1)
	one.must([]api.Attachment{containerOf(one.lease, 0)}, nil, usageOf(one.lease, 1, 0))
	put := func(change func(*api.Attachment)) api.AttachmentReport {
		a := containerOf(one.lease, 1)
		change(&a)
		return api.AttachmentReport{AgentID: one.lease.AgentID, Instance: one.next.Instance, Sequence: 2, Put: []api.Attachment{a}}
	}
	long := strings.Repeat("x", 257)
	usage := func(overlay string, half conf.Half) api.AttachmentReport {
		return api.AttachmentReport{AgentID: one.lease.AgentID, Instance: one.next.Instance, Sequence: 2, Usage: []api.HalfUsage{{Overlay: overlay, Half: half}}}
	}
	counts := func(c api.Count) api.AttachmentReport {
		r := usage("dcos", conf.Mesos)
		r.Usage[0].Count = c
		return r
	}
	twice := usage("dcos", conf.Mesos)
	twice.Usage = append(twice.Usage, twice.Usage[0])
	for name, c := range map[string]struct {
		report api.AttachmentReport
		code   int
		says   string
	}{
		"nobody":           {api.AttachmentReport{AgentID: "nobody", Instance: "i", Sequence: 1, Snapshot: true}, 404, "register first"},
		"no id":            {api.AttachmentReport{}, 400, "agent_id"},
		"another instance": {api.AttachmentReport{AgentID: one.lease.AgentID, Instance: "copy", Sequence: 1, Snapshot: true}, 409, "another one has its id"},
		"not continued":    {api.AttachmentReport{AgentID: one.lease.AgentID, Instance: one.next.Instance, Sequence: 7}, 409, "snapshot"},
		"half":             {put(func(a *api.Attachment) { a.Half = "upper" }), 400, "half"},
		"overlay":          {put(func(a *api.Attachment) { a.Overlay = "../x" }), 400, "overlay"},
		"id":               {put(func(a *api.Attachment) { a.ID = strings.Repeat(long, 4) }), 400, "container"},
		"network":          {put(func(a *api.Attachment) { a.Network = long }), 400, "name"},
		"many addresses":   {put(func(a *api.Attachment) { a.Addresses = make([]netip.Addr, 16) }), 400, "addresses"},
		"zone":             {put(func(a *api.Attachment) { a.Addresses = []netip.Addr{netip.MustParseAddr("fe80::1%eth0")} }), 400, "addresses"},
		"usage of nothing": {usage("green", conf.Mesos), 400, "usage"},
		"usage of no half": {usage("dcos", "upper"), 400, "usage"},
		"usage twice":      {twice, 400, "usage"},
		"room for all":     {counts(api.Count{Total: 1 << 40, Free: 1 << 40}), 400, "usage"},
		"more than all":    {counts(api.Count{Total: 125, Used: math.MaxUint64}), 400, "usage"},
		"all cooling":      {counts(api.Count{Total: 125, Cooling: math.MaxUint64}), 400, "usage"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := n.client.ReportAttachments(t.Context(), c.report)
			refused(t, err, c.code, c.says)
		})
	}
	many := api.AttachmentReport{AgentID: one.lease.AgentID, Instance: one.next.Instance, Sequence: 9, Snapshot: true}
	for i := range 20_000 {
		a := api.Attachment{Network: "n", ID: fmt.Sprint(i), IfName: "e", Overlay: "dcos", Half: conf.Mesos}
		many.Put = append(many.Put, a)
	}
	_, err := n.client.ReportAttachments(t.Context(), many)
	refused(t, err, http.StatusBadRequest, "room for, which is")
	if got := n.containers(t); got.Total != 1 || got.Containers[0].ID != containerOf(one.lease, 0).ID {
		t.Errorf("something has changed: %+v", got)
	}
}

// TestReportsOfAnySize: a body that unpacks to more than it may, or to nothing, is
// refused before it fills the memory.
func TestReportsOfAnySize(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	var bomb bytes.Buffer
	w, _ := gzip.NewWriterLevel(&bomb, gzip.BestCompression)
	_, _ = io.WriteString(w, `{"agent_id":"`)
	for range 20 {
		_, _ = w.Write(bytes.Repeat([]byte("a"), 1<<20))
	}
	w.Close()
	t.Logf("%d bytes unpack to 20 MiB", bomb.Len())
	post := func(body io.Reader, encoding string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, n.url+api.PathAttachments, body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Encoding", encoding)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	for _, c := range []struct {
		body     io.Reader
		encoding string
		code     int
	}{
		{&bomb, "gzip", http.StatusRequestEntityTooLarge},
		{strings.NewReader("not packed at all"), "gzip", http.StatusBadRequest},
		{strings.NewReader("{}"), "br", http.StatusUnsupportedMediaType},
	} {
		if code, text := post(c.body, c.encoding); code != c.code {
			t.Errorf("%s: %d %s, want %d", c.encoding, code, text, c.code)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

// TestReportsOfManyElements: a body of little else than commas is refused before its
// elements fill the memory, each of which is a hundred times as large there.
func TestReportsOfManyElements(t *testing.T) {
	const limit = 192 << 20
	n := start(t, newStore(t), seedNetwork)
	n.register(t, nth(1))
	for name, body := range map[string]string{
		"containers": `{"agent_id":"agent-1","instance":"i","put":[` + strings.Repeat("1,", 7<<20) + `1]}`,
		"usage":      `{"agent_id":"agent-1","instance":"i","usage":[` + strings.Repeat("{},", 5<<20) + `{}]}`,
		"addresses":  `{"agent_id":"agent-1","instance":"i","put":[{"addresses":[` + strings.Repeat(`"",`, 5<<20) + `""]}]}`,
		"routes":     `{"agent_id":"agent-1","instance":"i","host":{"routes":[` + strings.Repeat(`"",`, 5<<20) + `""]}}`,
	} {
		t.Run(name, func(t *testing.T) {
			var packed bytes.Buffer
			w := gzip.NewWriter(&packed)
			_, _ = io.WriteString(w, body)
			w.Close()
			size := packed.Len()
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, n.url+api.PathAttachments, &packed)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Encoding", "gzip")
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			text, _ := io.ReadAll(resp.Body)
			runtime.ReadMemStats(&after)
			if resp.StatusCode != http.StatusRequestEntityTooLarge || !strings.Contains(string(text), "elements") {
				t.Errorf("%d %.200s", resp.StatusCode, text)
			}
			took := after.TotalAlloc - before.TotalAlloc
			t.Logf("%d bytes on the wire, %d MiB of memory", size, took>>20)
			if took > limit {
				t.Errorf("it took %d MiB of memory, want at most %d", took>>20, limit>>20)
			}
		})
	}
	// What an agent does say at once is taken: so many containers, and commas in names.
	one := n.reporting(t, 2)
	r := one.next
	r.Sequence = 1
	for i := range 4000 {
		r.Put = append(r.Put, api.Attachment{Network: "n", ID: fmt.Sprint(i), IfName: "e", Overlay: "dcos", Half: conf.Mesos, Name: strings.Repeat(`,\"`, 40)})
	}
	_, err := n.client.ReportAttachments(t.Context(), r)
	refused(t, err, http.StatusBadRequest, "room for, which is") // it was read
	http.DefaultClient.CloseIdleConnections()
}

// TestWhatIsCutIsNotKept: of what is too long in a report only what is shown stays in
// memory.
func TestWhatIsCutIsNotKept(t *testing.T) {
	const limit = 2 << 20
	n := start(t, newStore(t), seedNetwork)
	one := n.reporting(t, 1)
	report := func() {
		problems := make([]string, 20)
		for i := range problems {
			problems[i] = strings.Repeat("x", 700<<10)
		}
		routes := make([]netip.Prefix, 100_000)
		for i := range routes {
			routes[i] = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		r := one.next
		r.Sequence, r.Problems, r.Host = 1, &problems, &api.Host{Datapath: problems[0], Routes: routes}
		if _, err := one.client.ReportAttachments(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.GC() // what a sync.Pool keeps
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	report()
	grown := heap() - before
	t.Logf("%d KiB are kept", grown>>10)
	if grown > limit {
		t.Errorf("that is more than %d KiB", limit>>10)
	}
}

// TestReportSize: what a container costs on the wire, whole requests of the size
// that a host of 20 sends.
func TestReportSize(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	lease := n.register(t, nth(1))
	const containers, most = 20, 100
	r := api.AttachmentReport{AgentID: "0f8fad5b-d9cb-469f-a165-70867728950e", Instance: "ABCDEFGHIJKLMNOPQRSTUVWXYZ", Sequence: 1, Snapshot: true, Usage: usageOf(lease, containers, 0)}
	changes := api.AttachmentReport{AgentID: r.AgentID, Instance: r.Instance, Sequence: 2}
	for i := range containers {
		r.Put = append(r.Put, containerOf(lease, i))
		changes.Delete = append(changes.Delete, containerOf(lease, i).Key())
	}
	for name, r := range map[string]api.AttachmentReport{"snapshot": r, "all of them gone": changes} {
		body, err := api.PackReport(r)
		if err != nil {
			t.Fatal(err)
		}
		plain, _ := json.Marshal(r)
		each := float64(len(body)) / containers
		t.Logf("%s of %d containers: %d bytes, %d packed, %.1f each", name, containers, len(plain), len(body), each)
		if each > most {
			t.Errorf("%s: %.1f bytes a container, want at most %d", name, each, most)
		}
	}
}

// follower has the events of a coordinator.
func (n *node) events(t testing.TB, after int64) <-chan api.Event {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out := make(chan api.Event, 5000)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = n.client.Events(ctx, after, true, func(e api.Event) error { out <- e; return nil })
	}()
	t.Cleanup(func() { cancel(); <-done })
	return out
}

func nextEvent(t testing.TB, events <-chan api.Event, kind api.EventKind) api.Event {
	t.Helper()
	for {
		select {
		case e := <-events:
			if e.Kind == kind {
				return e
			}
		case <-time.After(patience):
			t.Fatalf("no %s", kind)
		}
	}
}

// Who was told by a coordinator whose clock was ahead, another one or this one before a
// start, is told of what comes.
func TestEventsAfterAClockThatWasAhead(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.register(t, nth(0))
	eventually(t, "there is an event", func() bool {
		some := false
		err := n.client.Events(t.Context(), 0, false, func(api.Event) error { some = true; return nil })
		return err == nil && some
	})
	ahead := time.Now().Add(time.Hour).UnixMicro()
	get := func(follow string) *http.Response {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, n.url+api.PathEvents+"?follow="+follow, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Last-Event-ID", strconv.FormatInt(ahead, 10))
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	if text, err := io.ReadAll(get("false").Body); err != nil || strings.Contains(string(text), "data:") {
		t.Errorf("what was before is told again: %s, %v", text, err)
	}
	stream := get("true").Body
	late := time.AfterFunc(patience, func() { stream.Close() })
	defer late.Stop()
	n.register(t, nth(1))
	lines := bufio.NewScanner(stream)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "agent-1") {
			return
		}
	}
	t.Errorf("nothing was told of an agent that has joined: %v", lines.Err())
}

func TestEvents(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	events := n.events(t, 0)
	one := n.reporting(t, 1)
	if e := nextEvent(t, events, api.EventAgentJoined); e.AgentID != one.lease.AgentID || e.AgentIP != one.lease.AgentIP || e.Text == "" {
		t.Errorf("joined: %+v", e)
	}
	want := containerOf(one.lease, 0)
	one.must([]api.Attachment{want}, nil, usageOf(one.lease, 1, 0))
	attachedEvent := nextEvent(t, events, api.EventContainerAttached)
	if attachedEvent.Container != want.ID || attachedEvent.Overlay != "dcos" || !slices.Equal(attachedEvent.Addresses, want.Addresses) || attachedEvent.AgentID != one.lease.AgentID {
		t.Errorf("attached: %+v", attachedEvent)
	}
	one.must(nil, nil, usageOf(one.lease, 100, 1))
	if e := nextEvent(t, events, api.EventAddressesWarning); !strings.Contains(e.Text, "100 of 125 used, 1 cooling") {
		t.Errorf("warning: %+v", e)
	}
	one.must(nil, nil, usageOf(one.lease, 125, 0))
	nextEvent(t, events, api.EventAddressesFull)
	one.must(nil, []string{want.Key()}, usageOf(one.lease, 1, 99))
	if e := nextEvent(t, events, api.EventContainerDetached); e.Container != want.ID {
		t.Errorf("detached: %+v", e)
	}
	one.next.Problems = &[]string{"the disk is on fire"}
	one.must(nil, nil, usageOf(one.lease, 1, 0))
	nextEvent(t, events, api.EventAddressesOK)
	nextEvent(t, events, api.EventProblemBegun)
	one.next.Problems = &[]string{}
	one.must(nil, nil, nil)
	if e := nextEvent(t, events, api.EventProblemEnded); !strings.Contains(e.Text, "the disk is on fire") {
		t.Errorf("ended: %+v", e)
	}
	if _, err := n.client.Delete(t.Context(), []string{one.lease.AgentID}); err != nil {
		t.Fatal(err)
	}
	nextEvent(t, events, api.EventAgentGone)
	// Who was away goes on where it was.
	again := n.events(t, attachedEvent.ID)
	if e := <-again; e.ID <= attachedEvent.ID || e.Kind != api.EventAddressesWarning {
		t.Errorf("after %d comes %+v", attachedEvent.ID, e)
	}
}

// TestAgentsComeAndGo: an agent that is back within a moment is no event.
func TestAgentsComeAndGo(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	lease := n.register(t, nth(1))
	events := n.events(t, -1)
	s := n.watch(t, lease.AgentID, 0)
	s.next(t)
	s.stop()
	if e := nextEvent(t, events, api.EventAgentDisconnected); e.AgentID != lease.AgentID {
		t.Errorf("gone: %+v", e)
	}
	s = n.watch(t, lease.AgentID, 0)
	s.next(t)
	if e := nextEvent(t, events, api.EventAgentConnected); e.AgentID != lease.AgentID {
		t.Errorf("back: %+v", e)
	}
}

// TestEventsNobodyReads: who does not read is cut off, and nobody waits for it.
func TestEventsNobodyReads(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	n.SetPace(time.Second/5, 1<<30)
	one := n.reporting(t, 1)
	stop := errors.New("read one, and no more")
	ended := make(chan error, 1)
	release := make(chan struct{})
	reading := make(chan struct{})
	go func() {
		ended <- n.client.Events(context.Background(), 0, true, func(api.Event) error {
			select {
			case <-reading:
			default:
				close(reading)
			}
			<-release
			return nil
		})
	}()
	<-reading
	began := time.Now()
	long := strings.Repeat("x", 250)
	one.must(nil, nil, nil)
	for i := range 4000 {
		a := containerOf(one.lease, 0)
		a.ID, a.Name = fmt.Sprintf("%d-%s", i, long[:200]), long
		gone := []string(nil)
		if i > 0 {
			b := a
			b.ID = fmt.Sprintf("%d-%s", i-1, long[:200])
			gone = []string{b.Key()}
		}
		if err := n.TakeAttachments(api.AttachmentReport{AgentID: one.lease.AgentID, Instance: one.next.Instance, Sequence: uint64(i + 2), Put: []api.Attachment{a}, Delete: gone}); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("8,000 events past a reader that does not read took %s", time.Since(began).Round(time.Millisecond))
	close(release)
	select {
	case err := <-ended:
		if errors.Is(err, stop) || err == nil {
			t.Errorf("ended with %v", err)
		}
		t.Log(err)
	case <-time.After(patience):
		t.Error("the one that does not read is still connected")
	}
}
