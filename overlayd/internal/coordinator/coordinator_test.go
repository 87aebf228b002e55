package coordinator_test

import (
	"encoding/json"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/store"
)

func TestMain(m *testing.M) {
	if runAsChild() {
		return
	}
	goleak.VerifyTestMain(m)
}

func get(t testing.TB, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	http.DefaultClient.CloseIdleConnections()
	return resp.StatusCode, string(b)
}

var allOK = map[string]conf.OverlayStatus{"dcos": {Status: conf.StatusOK}, "dcos6": {Status: conf.StatusOK}}

// Three agents, one of them without bridges, make the state of the seed
// document, key for key and value for value, and keep it over a restart.
func TestSeedState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	n := start(t, s, seedNetwork)
	for id, req := range []api.RegisterRequest{
		request("master", "172.17.0.2"),
		request("a", "172.17.0.4", conf.Docker, conf.Mesos),
		request("b", "172.17.0.3", conf.Mesos, conf.Docker),
	} {
		n.register(t, req)
		if err := n.client.Report(t.Context(), api.StatusReport{AgentID: req.AgentID, Overlays: allOK}); err != nil {
			t.Fatal(id, err)
		}
	}
	golden, err := os.ReadFile("testdata/state.json")
	if err != nil {
		t.Fatal(err)
	}
	check := func(n *node) {
		t.Helper()
		code, body := get(t, n.url+api.PathMasterState)
		if code != http.StatusOK {
			t.Fatal(code, body)
		}
		if diff := cmp.Diff(generic(t, string(golden)), generic(t, body)); diff != "" {
			t.Errorf("state (-seed +got):\n%s", diff)
		}
		var compact strings.Builder
		enc := json.NewEncoder(&compact)
		if err := enc.Encode(generic(t, string(golden))); err != nil {
			t.Fatal(err)
		}
		if compact.String() != body { // Go prints maps in byte order of the keys, like DC/OS
			t.Errorf("keys are not in byte order:\n%s", body)
		}
	}
	check(n)
	n.stop()
	s.Close()
	check(start(t, openStore(t, path), seedNetwork))
}

func generic(t testing.TB, text string) (v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestLease(t *testing.T) {
	n := start(t, newStore(t), strings.Replace(seedNetwork, `"overlays"`, `"vtep_mtu": 1400, "overlays"`, 1))
	first := n.register(t, request("a", "10.0.0.1", conf.Docker))
	if first.ClusterID == "" || first.Epoch == 0 {
		t.Errorf("cluster id %q, epoch %d", first.ClusterID, first.Epoch)
	}
	network := parseNetwork(t, seedNetwork)
	want := conf.Lease{
		ClusterID: first.ClusterID, AgentID: "a", AgentIP: netip.MustParseAddr("10.0.0.1"),
		Epoch: first.Epoch, TermSeconds: 86400, Bridges: []conf.Half{conf.Docker},
		VTEP: conf.VTEP{
			IP: netip.MustParsePrefix("44.128.0.1/20"), IP6: netip.MustParsePrefix("fd01:a::1/64"),
			MAC: conf.MAC{0x70, 0xb3, 0xd5, 0x80, 0, 1}, MTU: 1400,
		},
		Grants: []conf.Grant{
			{Overlay: network.Overlays[0], Subnet: netip.MustParsePrefix("9.0.0.0/24")},
			{Overlay: network.Overlays[1], Subnet6: netip.MustParsePrefix("fd01:b::/80")},
		},
	}
	sameLease(t, "lease", want, first)
	if second := n.register(t, request("b", "10.0.0.2")); second.Epoch <= first.Epoch || second.Bridges == nil {
		t.Errorf("second lease has epoch %d after %d, bridges %v", second.Epoch, first.Epoch, second.Bridges)
	}
}

func samePrefix(a, b netip.Prefix) bool { return a == b }
func sameAddr(a, b netip.Addr) bool     { return a == b }

func sameLease(t testing.TB, what string, want, got conf.Lease) {
	t.Helper()
	if s := got.Signed; s != nil { // what was signed is this very lease
		var signed conf.Lease
		if err := json.Unmarshal([]byte(s.Lease), &signed); err != nil {
			t.Errorf("%s: the signed lease: %v", what, err)
		}
		got.Signed = nil
		sameLease(t, what+", as signed", got, signed)
	}
	want.Signed = nil
	if diff := cmp.Diff(want, got, cmp.Comparer(samePrefix), cmp.Comparer(sameAddr)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// The same agent id gets the same lease for ever, and a renewal that changes
// nothing writes nothing.
func TestRenewal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	n := start(t, s, seedNetwork)
	n.register(t, request("other", "10.0.0.9"))
	lease := n.register(t, request("a", "10.0.0.1", conf.Mesos))
	before := revision(t, s)
	for range 5 {
		sameLease(t, "renewal", lease, n.register(t, request("a", "10.0.0.1", conf.Mesos)))
	}
	if after := revision(t, s); after != before {
		t.Errorf("renewals wrote: revision %d, before %d", after, before)
	}
	n.stop()
	s.Close()
	s = openStore(t, path)
	n = start(t, s, seedNetwork)
	before = revision(t, s) // the start began a run
	sameLease(t, "after a restart", lease, n.register(t, request("a", "10.0.0.1", conf.Mesos)))
	if after := revision(t, s); after != before {
		t.Errorf("a renewal after the restart wrote: revision %d, before %d", after, before)
	}

	bridged := n.register(t, request("a", "10.0.0.1", conf.Mesos, conf.Docker))
	if bridged.Epoch <= lease.Epoch {
		t.Errorf("epoch %d after other bridges, before %d", bridged.Epoch, lease.Epoch)
	}
	lease.Epoch, lease.Bridges = bridged.Epoch, []conf.Half{conf.Mesos, conf.Docker}
	sameLease(t, "other bridges", lease, bridged)

	upgraded := request("a", "10.0.0.1", conf.Mesos, conf.Docker)
	upgraded.Version = "2.0"
	sameLease(t, "other version", lease, n.register(t, upgraded))
	if got := n.Agents()[1].Version; got != "2.0" {
		t.Errorf("version %q", got)
	}
}

func revision(t testing.TB, s store.Store) uint64 {
	t.Helper()
	_, rev, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return rev
}

// stored are the keys in the store.
func stored(t testing.TB, s store.Store) []string {
	t.Helper()
	kvs, _, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, kv := range kvs {
		if kv.Key == "runs" || strings.HasPrefix(kv.Key, "seen/") || strings.HasPrefix(kv.Key, "coordinators/") {
			continue // what coordinators tell each other
		}
		keys = append(keys, kv.Key)
	}
	return keys
}

func TestBadRegistration(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	ok := `"agent_id": "a", "agent_ip": "10.0.0.1", `
	for name, tt := range map[string]struct {
		body  string
		code  int
		words []string
	}{
		"empty":              {"", 400, []string{"empty"}},
		"no JSON":            {"{", 400, []string{"JSON"}},
		"two documents":      {"{" + ok + `"version": "1"} {}`, 400, []string{"after the first"}},
		"no id":              {`{"agent_ip": "10.0.0.1"}`, 400, []string{"agent_id"}},
		"bad id":             {`{"agent_id": "../x", "agent_ip": "10.0.0.1"}`, 400, []string{"agent_id", "../x"}},
		"long id":            {`{"agent_id": "` + strings.Repeat("a", 65) + `", "agent_ip": "10.0.0.1"}`, 400, []string{"64"}},
		"no ip":              {`{"agent_id": "a"}`, 400, []string{"agent_ip", "missing"}},
		"bad ip":             {`{"agent_id": "a", "agent_ip": "10.0.0.256"}`, 400, []string{"10.0.0.256"}},
		"loopback":           {`{"agent_id": "a", "agent_ip": "127.0.0.1"}`, 400, []string{"127.0.0.1", "--agent-ip"}},
		"multicast":          {`{"agent_id": "a", "agent_ip": "224.0.0.1"}`, 400, []string{"224.0.0.1"}},
		"broadcast":          {`{"agent_id": "a", "agent_ip": "255.255.255.255"}`, 400, []string{"255.255.255.255"}},
		"unspecified":        {`{"agent_id": "a", "agent_ip": "::"}`, 400, []string{"::"}},
		"link-local":         {`{"agent_id": "a", "agent_ip": "fe80::1"}`, 400, []string{"link-local"}},
		"zone":               {`{"agent_id": "a", "agent_ip": "fe80::1%eth0"}`, 400, []string{"zone"}},
		"mapped":             {`{"agent_id": "a", "agent_ip": "::ffff:10.0.0.1"}`, 400, []string{"mapped"}},
		"inside an overlay":  {`{"agent_id": "a", "agent_ip": "9.1.2.3"}`, 400, []string{"overlay dcos"}},
		"inside VTEP subnet": {`{"agent_id": "a", "agent_ip": "44.128.1.1"}`, 400, []string{"VTEP"}},
		"bad bridge":         {"{" + ok + `"bridges": ["kube"]}`, 400, []string{"kube"}},
		"bridge twice":       {"{" + ok + `"bridges": ["mesos", "mesos"]}`, 400, []string{"twice"}},
		"too large":          {"{" + ok + `"version": "` + strings.Repeat("x", 1<<20) + `"}`, 413, []string{"1048576"}},
	} {
		t.Run(name, func(t *testing.T) {
			code, message := post(t, n.url+api.PathRegister, tt.body)
			if code != tt.code {
				t.Errorf("code %d, want %d (%s)", code, tt.code, message)
			}
			for _, w := range tt.words {
				if !strings.Contains(message, w) {
					t.Errorf("message %q does not say %q", message, w)
				}
			}
		})
	}
	if agents := n.Agents(); len(agents) != 0 {
		t.Errorf("agents: %v", agents)
	}
}

// post returns the code and the message of the error in the answer.
func post(t testing.TB, url, body string) (int, string) {
	t.Helper()
	resp, err := http.Post(url, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer http.DefaultClient.CloseIdleConnections()
	defer resp.Body.Close()
	if ct := resp.Header.Get("Content-Type"); ct != "application/json" {
		t.Errorf("content type %q", ct)
	}
	var answer api.Error
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, answer.Message
}

func TestRoutes(t *testing.T) {
	n := start(t, newStore(t), seedNetwork)
	for _, tt := range []struct {
		method, path string
		code         int
		body         string
	}{
		{"GET", "/healthz", 200, `"status":"ok"`},
		{"GET", "/readyz", 200, `"status":"ready"`},
		{"GET", "/v1/agents", 200, "[]"},
		{"GET", "/v1/overlays", 200, `{"name":"dcos","prefix":24,"subnet":"9.0.0.0/8","configured":true,"leases":0,"pool":{"total":65536,"used":0}}`},
		{"GET", "/overlay-master/state", 200, `{"network":{"overlays":[{"name":"dcos","prefix":24,"subnet":"9.0.0.0/8"}`},
		{"GET", "/metrics", 200, `overlay_build_info{program="coordinator",version="test"} 1`},
		{"POST", "/metrics", 405, "only GET"},
		{"GET", "/overlay-master/agents/delete", 405, `{"error":"GET /overlay-master/agents/delete: only POST is served here"}`},
		{"POST", "/overlay-master/state", 405, `only GET`},
		{"DELETE", "/v1/register", 405, `only POST`},
		{"GET", "/overlay-master", 404, "GET /overlay-master/state"},
		{"GET", "/v1/watch?agent=nobody", 404, "register first"},
		{"GET", "/v1/watch?agent=", 400, "agent_id"},
		{"GET", "/v1/watch?agent=a&revision=x", 400, "revision"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tt.method, n.url+tt.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != tt.code || !strings.Contains(string(b), tt.body) {
			t.Errorf("%s %s: %d %s (%v), want %d with %s", tt.method, tt.path, resp.StatusCode, b, err, tt.code, tt.body)
		}
		if tt.code == 405 && resp.Header.Get("Allow") == "" {
			t.Errorf("%s %s: no Allow header", tt.method, tt.path)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	n := start(t, s, seedNetwork)
	report := func(id string, overlays map[string]conf.OverlayStatus) error {
		return n.client.Report(t.Context(), api.StatusReport{AgentID: id, Overlays: overlays})
	}
	refused(t, report("a", allOK), 404, "agent a", "register")
	n.register(t, request("a", "10.0.0.1", conf.Mesos))
	if state := n.State(); state.Agents[0].Overlays[0].State != nil {
		t.Error("a state before the agent reported")
	}
	refused(t, report("a", map[string]conf.OverlayStatus{"dcos": {Status: "STATUS_INVALID"}}), 400, "STATUS_INVALID", "dcos")
	refused(t, report("!", allOK), 400, "agent_id")
	failed := map[string]conf.OverlayStatus{
		"dcos":  {Status: conf.StatusFailed, Error: "no such device"},
		"dcos6": {Status: conf.StatusConfiguring},
		"never": {Status: conf.StatusOK}, // ignored; the original master died of it
	}
	if err := report("a", failed); err != nil {
		t.Fatal(err)
	}
	check := func(n *node) {
		t.Helper()
		o := n.State().Agents[0].Overlays
		got := []conf.OverlayStatus{*o[0].State, *o[1].State}
		if diff := cmp.Diff([]conf.OverlayStatus{failed["dcos"], failed["dcos6"]}, got); diff != "" {
			t.Errorf("status (-want +got):\n%s", diff)
		}
		if st := n.Agents()[0].Status; len(st) != 2 {
			t.Errorf("status of the agent: %v", st)
		}
	}
	check(n)
	before := revision(t, s)
	if err := report("a", failed); err != nil {
		t.Fatal(err)
	}
	if after := revision(t, s); after != before {
		t.Error("a report that changes nothing was written")
	}
	n.stop()
	s.Close()
	check(start(t, openStore(t, path), seedNetwork))
}

func TestDelete(t *testing.T) {
	s := newStore(t)
	n := start(t, s, seedNetwork)
	clean := stored(t, s)
	first := n.register(t, request("a", "10.0.0.1", conf.Mesos))
	n.register(t, request("b", "10.0.0.2"))
	if err := n.client.Report(t.Context(), api.StatusReport{AgentID: "a", Overlays: allOK}); err != nil {
		t.Fatal(err)
	}
	for body, words := range map[string]string{
		`{`:                         "JSON",
		`[]`:                        "JSON",
		`{}`:                        "missing",
		`{"agents": null}`:          "array of strings",
		`{"agents": "10.0.0.1"}`:    "array of strings",
		`{"agents": [1]}`:           "array of strings",
		`{"agents": ["a", "no/"]}`:  "agents[1]",
		`{"agents": ["10.0.0.1/8"]`: "JSON",
	} {
		if code, message := post(t, n.url+api.PathAgentsDelete, body); code != 400 || !strings.Contains(message, words) {
			t.Errorf("%s: %d %s, want 400 with %q", body, code, message, words)
		}
	}
	if len(n.State().Agents) != 2 {
		t.Fatal("a refused request deleted")
	}
	state, err := n.client.Delete(t.Context(), []string{"10.0.0.1", "10.9.9.9", "nobody"})
	if err != nil {
		t.Fatal(err)
	}
	if len(state.Agents) != 1 || state.Agents[0].IP != netip.MustParseAddr("10.0.0.2") {
		t.Errorf("state after the delete: %v", state.Agents)
	}
	// Its VTEP and subnets are free: the next agent gets them, lowest first.
	again := n.register(t, request("c", "10.0.0.3", conf.Mesos))
	if again.VTEP != first.VTEP || again.Grants[0].Subnet != first.Grants[0].Subnet || again.Epoch <= first.Epoch {
		t.Errorf("lease %v, want what was freed: %v", again, first)
	}
	if _, err := n.client.Delete(t.Context(), []string{"c", "b", "c"}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(clean, stored(t, s)); diff != "" {
		t.Errorf("the deleted agents left something (-want +got):\n%s", diff)
	}
	for _, o := range n.Overlays() {
		if o.Leases != 0 || o.Pool != nil && o.Pool.Used != 0 || o.Pool6 != nil && o.Pool6.Used != 0 {
			t.Errorf("overlay %s still counts leases", o.Name)
		}
	}
}
