package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// engine stands in for a dockerd that refuses, hangs or goes. What a dockerd
// does that is well is tested with the real one, in integration/lab/engines.
type engine struct {
	t    *testing.T
	path string

	mu       sync.Mutex
	version  string // answer to /version
	networks map[string]network
	stopped  []string // containers of every network
	creates  int
	asked    func() // for all networks
	refuse   func(method string, n network) (status int, message string)
	streams  []chan string // of /events
	server   *http.Server
}

func newEngine(t *testing.T, path string) *engine {
	e := &engine{t: t, path: path, networks: map[string]network{}, version: `{"Version":"20.10.24","ApiVersion":"1.41","MinAPIVersion":"1.12"}`}
	t.Cleanup(e.stop)
	return e
}

func (e *engine) start() {
	e.t.Helper()
	l, err := net.Listen("unix", e.path)
	if err != nil {
		e.t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, e.version) })
	mux.HandleFunc("GET /{v}/events", e.events)
	mux.HandleFunc("GET /{v}/networks", func(w http.ResponseWriter, _ *http.Request) {
		e.mu.Lock()
		defer e.mu.Unlock()
		if e.asked != nil {
			e.asked()
		}
		out := []network{}
		for _, n := range e.networks {
			n.Containers = nil
			out = append(out, n)
		}
		json.NewEncoder(w).Encode(out)
	})
	mux.HandleFunc("GET /{v}/containers/json", func(w http.ResponseWriter, r *http.Request) {
		e.mu.Lock()
		defer e.mu.Unlock()
		if !strings.Contains(r.FormValue("filters"), `"network":["`) || r.FormValue("all") != "true" {
			e.t.Errorf("containers asked for with %s", r.URL.RawQuery)
		}
		list := []map[string][]string{}
		for _, name := range e.stopped {
			list = append(list, map[string][]string{"Names": {"/" + name}})
		}
		json.NewEncoder(w).Encode(list)
	})
	mux.HandleFunc("GET /{v}/networks/{id}", e.one)
	mux.HandleFunc("DELETE /{v}/networks/{id}", e.one)
	mux.HandleFunc("POST /{v}/networks/create", e.create)
	s := &http.Server{Handler: mux}
	e.mu.Lock()
	e.server = s
	e.mu.Unlock()
	go s.Serve(l)
}

// stop is kill -9.
func (e *engine) stop() {
	e.mu.Lock()
	s := e.server
	e.server = nil
	e.mu.Unlock()
	if s != nil {
		s.Close()
	}
}

func (e *engine) events(w http.ResponseWriter, r *http.Request) {
	c := make(chan string, 16)
	e.mu.Lock()
	e.streams = append(e.streams, c)
	e.mu.Unlock()
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case text := <-c:
			fmt.Fprintln(w, text)
			w.(http.Flusher).Flush()
		}
	}
}

func (e *engine) tell(text string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, c := range e.streams {
		select {
		case c <- text:
		default:
		}
	}
}

func (e *engine) one(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	n, ok := e.networks[r.PathValue("id")]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	if e.refused(w, r.Method, n) {
		return
	}
	if r.Method == http.MethodDelete {
		delete(e.networks, n.ID)
		return
	}
	json.NewEncoder(w).Encode(n)
}

func (e *engine) create(w http.ResponseWriter, r *http.Request) {
	var n network
	if err := json.NewDecoder(r.Body).Decode(&n); err != nil {
		e.t.Errorf("create: %v", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.creates++
	if e.refused(w, r.Method, n) {
		return
	}
	n.ID = n.Name + "-id"
	e.networks[n.ID] = n
	w.WriteHeader(http.StatusCreated)
	fmt.Fprintf(w, `{"Id":%q}`, n.ID)
}

func (e *engine) refused(w http.ResponseWriter, method string, n network) bool {
	if e.refuse == nil {
		return false
	}
	status, message := e.refuse(method, n)
	if status == 0 {
		return false
	}
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]string{"message": message})
	return true
}

func (e *engine) change(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f()
}

func (e *engine) created() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.creates
}

func (e *engine) names() (out []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, n := range e.networks {
		out = append(out, n.Name)
	}
	slices.Sort(out)
	return out
}

// A host is a Docker with its engine.
type host struct {
	*Docker
	t        *testing.T
	dir      string
	engine   *engine
	log      *syncBuffer
	firewall chan struct{}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// newHost runs a Docker against an engine that is not started yet.
func newHost(t *testing.T) *host {
	t.Helper()
	dir := tempDir(t)
	h := &host{t: t, dir: dir, engine: newEngine(t, filepath.Join(dir, "docker.sock")), log: &syncBuffer{}, firewall: make(chan struct{}, 1)}
	var err error
	h.Docker, err = New(Options{
		Host: "unix://" + h.engine.path, PluginDir: filepath.Join(dir, "plugins"), RunDir: dir,
		Log: slog.New(slog.NewTextHandler(h.log, nil)),
		FirewallChanged: func() {
			select {
			case h.firewall <- struct{}{}:
			default:
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	h.timing = timing{
		request: 2 * time.Second, coalesce: 5 * time.Millisecond, look: 50 * time.Millisecond, grace: 20 * time.Millisecond,
		retryMin: 5 * time.Millisecond, retryMax: 20 * time.Millisecond, stale: 100 * time.Millisecond,
	}
	return h
}

func (h *host) run() {
	ctx, cancel := context.WithCancel(h.t.Context())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	h.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			h.t.Errorf("Run: %v", err)
		}
		h.client.http.CloseIdleConnections()
		if h.t.Failed() {
			h.t.Log(h.log)
		}
	})
}

// eventually waits until what is observed is what is wanted.
func eventually[T any](t *testing.T, what string, observe func() T, want T) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		got := observe()
		if fmt.Sprint(got) == fmt.Sprint(want) {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("%s: %v, want %v", what, got, want)
		case <-tick.C:
		}
	}
}

func TestNew(t *testing.T) {
	for _, o := range []Options{
		{Host: "tcp://127.0.0.1:2375", PluginDir: "/p"},
		{Host: "unix://docker.sock", PluginDir: "/p"},
		{Host: "", PluginDir: "/p"},
		{Host: "unix:///" + strings.Repeat("x", 120), PluginDir: "/p"},
		{Host: "unix:///d", PluginDir: ""},
		{Host: "unix:///d", PluginDir: "/" + strings.Repeat("x", 100)},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
}

func TestAbsentSlowAndGone(t *testing.T) {
	h := newHost(t)
	h.run()
	h.Set(leased(conf.Halves[:]...), 1450)
	eventually(t, "the socket is there before dockerd", func() bool {
		c, err := net.Dial("unix", filepath.Join(h.dir, "plugins", socketFile))
		if err == nil {
			c.Close()
		}
		return err == nil
	}, true)
	equal(t, "no dockerd is no problem", h.Problems(), []string(nil))

	h.engine.start()
	all := []string{"both", "dcos", "dcos6"}
	eventually(t, "networks", h.engine.names, all)
	<-h.firewall
	creates := h.engine.created()

	h.engine.stop()
	eventually(t, "noticed", func() bool { return strings.Contains(h.log.String(), "dockerd has gone") }, true)
	equal(t, "gone is no problem either", h.Problems(), []string(nil))
	h.engine.start()
	<-h.firewall // its rules stand before ours again
	eventually(t, "found again", func() int { return strings.Count(h.log.String(), "dockerd found") }, 2)
	equal(t, "nothing to be made", h.engine.created(), creates)

	h.engine.tell(`{"Type":"container","Action":"start"}`)
	h.engine.tell(`{"Type":"network","Action":"create"}`)
	<-h.firewall
	h.engine.change(func() { clear(h.engine.networks) })
	h.engine.tell(`{"Type":"network","Action":"destroy","Actor":{"Attributes":{"name":"dcos"}}}`)
	eventually(t, "made anew", h.engine.names, all)
}

// TestSocketRemoved: whoever cleans up /run/docker takes the driver's socket
// along.
func TestSocketRemoved(t *testing.T) {
	h := newHost(t)
	h.driver.look = 5 * time.Millisecond
	h.run()
	path := filepath.Join(h.dir, "plugins", socketFile)
	answers := func() bool {
		c, err := net.Dial("unix", path)
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	eventually(t, "answers", answers, true)
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "answers again", answers, true)
	eventually(t, "problems", h.Problems, nil)

	// A socket of somebody else in its place stays.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	theirs, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "problems", h.Problems, []string{"docker IPAM driver: listen: somebody serves on " + path + " already; does a second daemon run on this host?"})
	equal(t, "theirs answers", answers(), true)
	theirs.Close()
	eventually(t, "problems", h.Problems, nil)
}

func TestDoesNotAnswer(t *testing.T) {
	h := newHost(t)
	h.timing.request = 50 * time.Millisecond
	l, err := net.Listen("unix", h.engine.path) // takes connections, as a dockerd that starts
	if err != nil {
		t.Fatal(err)
	}
	h.run()
	eventually(t, "problem", h.Problems, []string{"docker engine: dockerd at unix://" + h.engine.path + " takes connections and does not answer"})
	l.Close()
	h.engine.start()
	eventually(t, "problem", h.Problems, nil)
}

func TestPodmanInPlaceOfDocker(t *testing.T) {
	h := newHost(t)
	h.engine.version = `{"Version":"5.4.0","ApiVersion":"1.41","Components":[{"Name":"Podman Engine"}]}`
	h.engine.start()
	if _, err := h.session(t.Context()); err != errPodman {
		t.Errorf("session: %v", err)
	}
	h.client.http.CloseIdleConnections()
}

func TestWantedNetworks(t *testing.T) {
	overlays := leased(conf.Halves[:]...)
	off := false
	base := func(o, bridge string, v6 bool, config ...ipamConfig) network {
		return network{
			Name: o, Driver: "bridge", EnableIPv6: v6, CheckDuplicate: true,
			IPAM:   ipamSettings{Driver: "overlay", Options: map[string]string{"overlay": o}, Config: config},
			Labels: map[string]string{"overlayd.overlay": o},
			Options: map[string]string{
				"com.docker.network.bridge.name": bridge, "com.docker.network.bridge.enable_ip_masquerade": "false",
				"com.docker.network.bridge.inhibit_ipv4": "true", "com.docker.network.driver.mtu": "1450",
			},
		}
	}
	both := []ipamConfig{{Subnet: "10.64.0.128/25", Gateway: "10.64.0.129"}, {Subnet: "fd01:c::8000:0:0/81", Gateway: "fd01:c::8000:0:1"}}
	six := ipamConfig{Subnet: "fd01:b::8000:0:0/81", Gateway: "fd01:b::8000:0:1"}
	by := bystander("dcos6", nil)
	beside := ipamConfig{Subnet: by.String(), Gateway: by.Addr().Next().String()}

	old := []network{
		base("both", "d-both", true, both...),
		base("dcos", "d-dcos", false, ipamConfig{Subnet: "9.0.1.128/25", Gateway: "9.0.1.129"}),
		base("dcos6", "d-dcos6", true, six, beside),
	}
	modern := []network{
		base("both", "d-both", true, both...),
		base("dcos", "d-dcos", false, ipamConfig{Subnet: "9.0.1.128/25", Gateway: "9.0.1.129"}),
		base("dcos6", "d-dcos6", true, six),
	}
	const mode = "com.docker.network.bridge.gateway_mode_ipv"
	modern[0].Options[mode+"4"], modern[0].Options[mode+"6"] = "nat-unprotected", "nat-unprotected"
	modern[1].Options[mode+"4"] = "nat-unprotected"
	modern[2].Options[mode+"6"], modern[2].EnableIPv4 = "nat-unprotected", &off

	for _, tt := range []struct {
		api  string
		want []network
	}{{"1.41", old}, {"1.47", old}, {"1.48", modern}} {
		t.Run(tt.api, func(t *testing.T) {
			h := newHost(t)
			h.client.used.Store(&tt.api)
			for i, o := range overlays {
				got := h.want(o, 1450, nil)
				equal(t, o.Info.Name, got, tt.want[i])
				if d := difference(got, got); d != "" {
					t.Errorf("%s differs from itself: %s", o.Info.Name, d)
				}
			}
		})
	}

	// A block that somebody else has is passed over, and which one a network has
	// does not matter.
	h := newHost(t)
	api := "1.41"
	h.client.used.Store(&api)
	other := network{Name: "x", IPAM: ipamSettings{Config: []ipamConfig{{Subnet: by.String()}}}}
	moved := h.want(overlays[2], 1450, []network{other})
	if moved.IPAM.Config[1].Subnet == beside.Subnet || difference(old[2], moved) != "" || difference(modern[2], moved) == "" {
		t.Errorf("beside another network: %+v, %q", moved.IPAM, difference(old[2], moved))
	}
}

func TestDifference(t *testing.T) {
	h := newHost(t)
	want := h.want(leased(conf.Docker)[0], 1450, nil)
	for _, tt := range []struct {
		name   string
		change func(*network)
		want   string
	}{
		{"same", func(*network) {}, ""},
		{"an option of the user", func(n *network) { n.Options["com.docker.network.bridge.host_binding_ipv4"] = "10.0.0.1" }, ""},
		{"a label of the user", func(n *network) { n.Labels["a"] = "b" }, ""},
		{"subnets in another order", func(n *network) { slices.Reverse(n.IPAM.Config) }, ""},
		{"gateway with its length", func(n *network) { n.IPAM.Config[1].Gateway += "/81" }, ""},
		{"driver", func(n *network) { n.Driver = "macvlan" }, "its driver is macvlan"},
		{"internal", func(n *network) { n.Internal = true }, "it is internal"},
		{"IPv6", func(n *network) { n.EnableIPv6 = false }, "its IPv6 is off"},
		{"IPAM driver", func(n *network) { n.IPAM.Driver = "default" }, "its IPAM driver is default"},
		{"overlay", func(n *network) { n.IPAM.Options = nil }, `its addresses are of overlay ""`},
		{"gateway left to the driver", func(n *network) { n.IPAM.Config[0].Gateway = "" }, ""},
		{"a range of the user", func(n *network) { n.IPAM.Config[0].IPRange = "10.64.0.192/26" }, ""},
		{"gateway", func(n *network) { n.IPAM.Config[0].Gateway = "10.64.0.140" },
			"it has 10.64.0.128/25 with gateway 10.64.0.140, fd01:c::8000:0:0/81 where the lease has 10.64.0.128/25, fd01:c::8000:0:0/81"},
		{"subnet", func(n *network) { n.IPAM.Config = n.IPAM.Config[:1] }, "it has 10.64.0.128/25 where the lease has 10.64.0.128/25, fd01:c::8000:0:0/81"},
		{"no subnet", func(n *network) { n.IPAM.Config = nil }, "it has no subnet where the lease has 10.64.0.128/25, fd01:c::8000:0:0/81"},
		{"MTU", func(n *network) { n.Options["com.docker.network.driver.mtu"] = "1500" }, `its option com.docker.network.driver.mtu is "1500" instead of "1450"`},
		{"before the engine was upgraded", func(n *network) { delete(n.Options, optionMode4) },
			`its option com.docker.network.bridge.gateway_mode_ipv4 is "" instead of "nat-unprotected"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, err := json.Marshal(want)
			if err != nil {
				t.Fatal(err)
			}
			var have network
			if err := json.Unmarshal(b, &have); err != nil {
				t.Fatal(err)
			}
			tt.change(&have)
			equal(t, "difference", difference(want, have), tt.want)
		})
	}
}

// problem is the one problem there is, without what it is about.
func (h *host) problem() string {
	p := h.Problems()
	if len(p) != 1 {
		return fmt.Sprint(p)
	}
	_, text, _ := strings.Cut(p[0], ": ")
	return text
}

func TestRepair(t *testing.T) {
	h := newHost(t)
	o := leased(conf.Docker)[1:2]
	h.engine.start()
	h.run()
	h.Set(o, 1450)
	eventually(t, "networks", h.engine.names, []string{"dcos"})

	mtu := func() string {
		h.engine.mu.Lock()
		defer h.engine.mu.Unlock()
		return h.engine.networks["dcos-id"].Options[optionMTU]
	}
	h.Set(o, 1400)
	eventually(t, "repaired", mtu, "1400")

	use := func(c map[string]endpoint) {
		h.engine.change(func() {
			n := h.engine.networks["dcos-id"]
			n.Containers = c
			h.engine.networks["dcos-id"] = n
		})
	}
	used := map[string]endpoint{}
	for i := range 7 {
		used[fmt.Sprint(i)] = endpoint{Name: fmt.Sprintf("web%d", i)}
	}
	use(used)
	h.Set(o, 1300)
	const users = "and it is used by web0, web1, web2, web3, web4, 2 more; remove these containers or detach them (docker network disconnect), then the agent sees to the rest"
	eventually(t, "not repaired", h.problem, `its option com.docker.network.driver.mtu is "1400" instead of "1300", `+users)
	h.Set(nil, 1300)
	eventually(t, "not removed", h.problem, "its overlay is no longer leased to this host, "+users)
	equal(t, "left alone", mtu(), "1400")
	h.engine.change(func() { h.engine.stopped = []string{"web1"} })
	use(map[string]endpoint{"1": {Name: "web1"}, "2": {Name: "web2"}})
	eventually(t, "running and stopped", h.problem, "its overlay is no longer leased to this host, and it is used by web1, web2; remove these containers or detach them (docker network disconnect), then the agent sees to the rest")
	use(nil)
	eventually(t, "stopped alone", h.problem, "its overlay is no longer leased to this host, and it is used by web1; remove these containers or detach them (docker network disconnect), then the agent sees to the rest")
	h.engine.change(func() { h.engine.stopped = nil })
	eventually(t, "removed", h.engine.names, nil)
	eventually(t, "problems", h.Problems, nil)
}

func TestRefusedByDocker(t *testing.T) {
	h := newHost(t)
	h.engine.refuse = func(method string, n network) (int, string) {
		return http.StatusForbidden, method + " is not for you"
	}
	h.engine.start()
	h.run()
	o := leased(conf.Docker)[1:2]
	h.Set(o, 1450)
	eventually(t, "create", h.problem, "create: POST is not for you")
	h.engine.change(func() { h.engine.refuse = nil })
	eventually(t, "created at last", h.engine.names, []string{"dcos"})

	h.engine.change(func() {
		h.engine.refuse = func(method string, n network) (int, string) {
			if method == http.MethodDelete {
				return http.StatusForbidden, "network dcos has active endpoints"
			}
			return 0, ""
		}
	})
	h.Set(o, 1400)
	eventually(t, "remove", h.problem, `its option com.docker.network.driver.mtu is "1450" instead of "1400"; remove it: network dcos has active endpoints`)
}

func TestForeignNetwork(t *testing.T) {
	h := newHost(t)
	h.engine.networks["x"] = network{ID: "x", Name: "dcos", Driver: "bridge"}
	h.engine.networks["y"] = network{ID: "y", Name: "other", Driver: "bridge"}
	h.engine.start()
	h.run()
	h.Set(leased(conf.Docker)[1:2], 1450)
	eventually(t, "problem", h.problem, "there is one of that name that the agent did not make, and its IPAM driver is ; remove it (docker network rm dcos), the agent makes it anew")
	h.Set(nil, 1450)
	eventually(t, "problems", h.Problems, nil)
	equal(t, "left alone", h.engine.names(), []string{"dcos", "other"})
}

// TestRemoved: a network that somebody removes is back within a second, with the
// times of the real agent.
func TestRemoved(t *testing.T) {
	h := newHost(t)
	h.timing = defaultTiming
	h.engine.start()
	h.run()
	h.Set(leased(conf.Docker)[1:2], 1450)
	eventually(t, "networks", h.engine.names, []string{"dcos"})
	for range 2 {
		h.engine.change(func() { clear(h.engine.networks) })
		h.engine.tell(`{"Type":"network","Action":"destroy"}`)
		begun := time.Now()
		eventually(t, "back", h.engine.names, []string{"dcos"})
		if took := time.Since(begun); took > time.Second {
			t.Errorf("the network was back after %s, want a second at most", took)
		}
	}
}

// TestReplaced: who removes a network has a moment to put his own in its place,
// which stays if it fits.
func TestReplaced(t *testing.T) {
	h := newHost(t)
	h.timing.grace = time.Hour
	h.engine.start()
	h.run()
	h.Set(leased(conf.Docker)[1:2], 1450)
	eventually(t, "networks", h.engine.names, []string{"dcos"})
	eventually(t, "the log", func() bool { return strings.Contains(h.log.String(), "docker network created") }, true)

	// dockerd tells of it only when its bridge and its addresses are gone too,
	// and a round may come before that.
	var theirs network
	h.engine.change(func() {
		theirs = h.engine.networks["dcos-id"]
		clear(h.engine.networks)
	})
	h.Set(append(leased(conf.Docker)[1:2], leased(conf.Docker)[0]), 1450)
	eventually(t, "the other one alone", h.engine.names, []string{"both"})
	theirs.Labels, theirs.IPAM.Config[0].IPRange = nil, "9.0.1.192/26"
	h.engine.change(func() { h.engine.networks["dcos-id"] = theirs })
	h.Set(leased(conf.Docker), 1450)
	eventually(t, "all", h.engine.names, []string{"both", "dcos", "dcos6"})
	equal(t, "problems", h.Problems(), []string(nil))
	h.engine.change(func() { equal(t, "left alone", h.engine.networks["dcos-id"].Labels, map[string]string(nil)) })
}

// TestIPv4IsInsistedOn: between 27 and 28 there were engines that know
// EnableIPv4 and refuse to turn it off.
func TestIPv4IsInsistedOn(t *testing.T) {
	h := newHost(t)
	h.engine.version = `{"Version":"28.0.0","ApiVersion":"1.48","MinAPIVersion":"1.24"}`
	h.engine.refuse = func(method string, n network) (int, string) {
		if method == http.MethodPost && n.EnableIPv4 != nil {
			return http.StatusBadRequest, "IPv4 can only be disabled if experimental features are enabled"
		}
		return 0, ""
	}
	h.engine.start()
	h.run()
	h.Set(leased(conf.Docker)[2:], 1450)
	eventually(t, "networks", h.engine.names, []string{"dcos6"})
	eventually(t, "problems", h.Problems, nil)
	h.engine.change(func() {
		equal(t, "subnets", len(h.engine.networks["dcos6-id"].IPAM.Config), 2)
		equal(t, "attempts", h.engine.creates, 2)
	})
}

func TestAddressesAreReconciled(t *testing.T) {
	h := newHost(t)
	if err := conf.WriteJSON(filepath.Join(h.dir, conf.StateFile), publishedState(t), 0o644); err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: h.dir, driver: h.driver}
	lost, kept := netip.MustParseAddr("9.0.1.140"), netip.MustParseAddr("9.0.1.141")
	cni := conf.Attachment{Network: "dcos", ContainerID: "c", IfName: "eth0"}
	r.with("dcos", func(s *ipam.Store) {
		ranges := halves(leased(conf.Docker)[1])
		for _, a := range []netip.Addr{lost, kept} {
			if _, err := s.AllocateSingle(t.Context(), ipam.SingleRequest{
				Half: conf.Docker, Ranges: ranges, From: ranges[0], Want: a,
				Name: func(a netip.Addr) conf.Attachment { return conf.DockerAttachment("dcos", a) },
			}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.Allocate(t.Context(), ipam.Request{Attachment: cni, Half: conf.Docker, Ranges: ranges}); err != nil {
			t.Fatal(err)
		}
	})
	ours := ipamSettings{Driver: Driver, Options: map[string]string{"overlay": "dcos"}, Config: []ipamConfig{
		{Subnet: "9.0.1.128/25", AuxiliaryAddresses: map[string]string{"printer": "9.0.1.142"}},
	}}
	six := ipamSettings{Driver: Driver, Options: map[string]string{"overlay": "dcos6"}, Config: []ipamConfig{{Subnet: "169.254.16.0/22"}}}
	h.engine.networks = map[string]network{
		"dcos": {ID: "dcos", Name: "dcos", Labels: map[string]string{label: "dcos"}, IPAM: ours, Containers: map[string]endpoint{
			"1": {Name: "kept", IPv4Address: "9.0.1.141/25"},
			"2": {Name: "unknown", IPv4Address: "9.0.1.143/25"},
			"3": {Name: "of an earlier lease", IPv4Address: "9.0.9.143/25"},
		}},
		"dcos6": {ID: "dcos6", Name: "dcos6", IPAM: six, Containers: map[string]endpoint{
			"1": {Name: "dual", IPv4Address: "169.254.16.2/22", IPv6Address: "fd01:b::8000:0:9/81"},
		}},
		"theirs": {ID: "theirs", Name: "theirs", IPAM: ipamSettings{Driver: "default"}, Containers: map[string]endpoint{
			"1": {Name: "x", IPv4Address: "9.0.1.150/25"},
		}},
	}
	h.engine.start()
	h.run()
	eventually(t, "filed in dcos", func() []string { return r.filed("dcos") }, []string{"9.0.1.130", "9.0.1.141", "9.0.1.142", "9.0.1.143"})
	eventually(t, "filed in dcos6", func() []string { return r.filed("dcos6") }, []string{"169.254.16.2", "fd01:b::8000:0:9"})
	equal(t, "problems", h.Problems(), []string(nil))

	// A container that uses what somebody else was given is a problem that a
	// person has to solve.
	h.engine.change(func() {
		n := h.engine.networks["dcos"]
		n.Containers = map[string]endpoint{"1": {Name: "thief", IPv4Address: "9.0.1.130/25"}}
		h.engine.networks["dcos"] = n
	})
	eventually(t, "problem", h.Problems, []string{"docker addresses: container thief uses an address of overlay dcos that it was not given: address 9.0.1.130 is in use by dcos/c/eth0"})
	eventually(t, "released", func() []string { return r.filed("dcos") }, []string{"9.0.1.130", "9.0.1.142"})
}

// TestFiledAnew: a store that was made anew beside Docker's containers gives out
// addresses again when those that Docker has are in it, and dockerd is asked at once.
func TestFiledAnew(t *testing.T) {
	h := newHost(t)
	h.timing.look = time.Hour
	if err := conf.WriteJSON(filepath.Join(h.dir, conf.StateFile), publishedState(t), 0o644); err != nil {
		t.Fatal(err)
	}
	h.engine.networks = map[string]network{"dcos": {
		ID: "dcos", Name: "dcos", Labels: map[string]string{label: "dcos"},
		IPAM:       ipamSettings{Driver: Driver, Options: map[string]string{"overlay": "dcos"}, Config: []ipamConfig{{Subnet: "9.0.1.128/25"}}},
		Containers: map[string]endpoint{"1": {Name: "kept", IPv4Address: "9.0.1.130/25"}},
	}}
	h.engine.start()
	h.run()
	r := &rig{t: t, dir: h.dir, driver: h.driver}
	eventually(t, "filed at first", func() []string { return r.filed("dcos") }, []string{"9.0.1.130"})
	h.loseStore()
	got, err := h.driver.allocate(t.Context(), pool{overlay: "dcos", prefix: netip.MustParsePrefix("9.0.1.128/25")}, netip.Addr{})
	if err != nil || got != netip.MustParseAddr("9.0.1.131") {
		t.Errorf("the next container gets %v (%v), want the address behind that of the first", got, err)
	}
	eventually(t, "filed", func() []string { return r.filed("dcos") }, []string{"9.0.1.130", "9.0.1.131"})
}

// loseStore has the store of dcos made anew beside containers of Docker.
func (h *host) loseStore() {
	if err := os.Remove(filepath.Join(h.dir, conf.IPAMDir, "dcos.db")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.t.Error(err)
	}
	s, err := ipam.Open(h.t.Context(), ipam.Options{
		Dir: filepath.Join(h.dir, conf.IPAMDir), Overlay: "dcos",
		Rebuild: func(context.Context) (ipam.Known, error) { return ipam.Known{Unfiled: []conf.Half{conf.Docker}}, nil },
	})
	if err != nil {
		h.t.Error(err)
		return
	}
	s.Close()
}

// TestLostWhileAsked: what Docker has said before a store was lost does not say what it
// has got since.
func TestLostWhileAsked(t *testing.T) {
	h := newHost(t)
	if err := conf.WriteJSON(filepath.Join(h.dir, conf.StateFile), publishedState(t), 0o644); err != nil {
		t.Fatal(err)
	}
	h.engine.start()
	defer h.client.http.CloseIdleConnections()
	h.engine.asked = h.loseStore
	for _, want := range []string{"[docker]", "[]"} {
		if err := h.syncAddresses(t.Context()); err != nil {
			t.Fatal(err)
		}
		pools, err := h.driver.unfiledOf(t.Context(), "dcos")
		equal(t, "waits for Docker's addresses", fmt.Sprint(pools, err), want+" <nil>")
		h.engine.change(func() { h.engine.asked = nil })
	}
}

// TestInUseByName: an address that a container has, and that is not filed yet, is not
// given to another one that asks for it by name.
func TestInUseByName(t *testing.T) {
	h := newHost(t)
	if err := conf.WriteJSON(filepath.Join(h.dir, conf.StateFile), publishedState(t), 0o644); err != nil {
		t.Fatal(err)
	}
	ours := ipamSettings{Driver: Driver, Options: map[string]string{"overlay": "dcos"}}
	h.engine.networks["dcos"] = network{ID: "dcos", Name: "dcos", IPAM: ours, Containers: map[string]endpoint{"1": {Name: "a", IPv4Address: "9.0.1.140/25"}}}
	h.engine.start()
	defer h.client.http.CloseIdleConnections()
	p, err := parsePool(dcos)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(a string) string {
		got, err := h.driver.allocate(t.Context(), p, netip.MustParseAddr(a))
		return fmt.Sprint(got, err)
	}
	h.loseStore()
	h.driver.connected(true)
	equal(t, "that of a container", ask("9.0.1.140"), "invalid IP address 9.0.1.140 is in use by container a of Docker")
	equal(t, "another", ask("9.0.1.141"), "9.0.1.141 <nil>")
	h.driver.connected(false)
	equal(t, "dockerd may be starting, and asks for what it has", ask("9.0.1.140"), "9.0.1.140 <nil>")
	h.loseStore()
	h.engine.stop()
	h.client.http.CloseIdleConnections()
	h.driver.connected(true)
	equal(t, "dockerd has gone a moment ago", ask("9.0.1.140"), "9.0.1.140 <nil>")
}

// TestConfirm: an address that Docker asks for again is its own if no container
// has it.
func TestConfirm(t *testing.T) {
	h := newHost(t)
	if err := conf.WriteJSON(filepath.Join(h.dir, conf.StateFile), publishedState(t), 0o644); err != nil {
		t.Fatal(err)
	}
	ours := ipamSettings{Driver: Driver, Options: map[string]string{"overlay": "dcos"}}
	h.engine.networks["dcos"] = network{ID: "dcos", Name: "dcos", IPAM: ours, Containers: map[string]endpoint{"1": {Name: "a", IPv4Address: "9.0.1.140/25"}}}
	h.engine.start()
	defer h.client.http.CloseIdleConnections()
	if _, err := h.client.negotiate(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := parsePool(dcos)
	if err != nil {
		t.Fatal(err)
	}
	used, free := netip.MustParseAddr("9.0.1.140"), netip.MustParseAddr("9.0.1.141")
	ask := func(a netip.Addr) string {
		_, err := h.driver.allocate(t.Context(), p, a)
		return fmt.Sprint(err)
	}
	const ok, taken = "<nil>", "address 9.0.1.140 is in use by a container of Docker"
	equal(t, "first", []string{ask(used), ask(free)}, []string{ok, ok})
	for _, up := range []bool{true, false} {
		h.driver.connected(up)
		equal(t, fmt.Sprintf("again, dockerd known to be up: %v", up), []string{ask(used), ask(free), ask(free)}, []string{taken, ok, ok})
	}
	h.engine.stop()
	h.client.http.CloseIdleConnections()
	h.driver.connected(true)
	equal(t, "it should be there", ask(used), taken)
	h.driver.connected(false)
	equal(t, "it starts", []string{ask(used), ask(used), ask(free), ask(free)},
		[]string{ok, taken, ok, "address 9.0.1.141 is in use by a container of Docker"})
}
