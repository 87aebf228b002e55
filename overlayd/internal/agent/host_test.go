package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/fast"
	"overlayd.internal/overlay/overlayd/internal/store/bbolt"
)

func TestMain(m *testing.M) {
	// Nothing an agent started may outlive it. The netlink sockets of a closed
	// datapath and the connections of a closed client are gone, too.
	goleak.VerifyTestMain(m)
}

// inHostEnv names the test that a process runs in a host of its own.
const inHostEnv = "OVERLAY_TEST_HOST"

// onOwnHost runs the calling test again in a process with a network namespace
// of its own and reports whether this is that process. An agent's goroutines
// run on any thread, so a namespace of one thread would not do.
//
//	this process: 172.17.0.2-9 on u0 ---- u1 172.17.0.1: coordinator
func onOwnHost(t *testing.T) bool {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	if os.Getenv(inHostEnv) == t.Name() {
		return true
	}
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=90s")
	cmd.Env = append(os.Environ(), inHostEnv+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("on a host of its own: %v\n%s", err, out)
	}
	return false
}

// remote is the network namespace of the coordinator.
type remote struct{ ns *os.File }

// newRemote makes the underlay.
func newRemote(t *testing.T) remote {
	t.Helper()
	r := remote{}
	onThread(t, func() {
		must(t, unix.Unshare(unix.CLONE_NEWNET))
		var err error
		r.ns, err = os.Open("/proc/thread-self/ns/net")
		must(t, err)
	})
	t.Cleanup(func() { r.ns.Close() })

	linkUp(t, "lo")
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "u0"}, PeerName: "u1"}))
	u1, err := netlink.LinkByName("u1")
	must(t, err)
	must(t, netlink.LinkSetNsFd(u1, int(r.ns.Fd())))
	for n := 2; n < 10; n++ {
		addAddr(t, "u0", fmt.Sprintf("172.17.0.%d/24", n))
	}
	linkUp(t, "u0")
	r.do(t, func() {
		linkUp(t, "lo")
		addAddr(t, "u1", "172.17.0.1/24")
		linkUp(t, "u1")
	})
	return r
}

// do runs f in the coordinator's namespace.
func (r remote) do(t *testing.T, f func()) {
	t.Helper()
	onThread(t, func() {
		must(t, unix.Setns(int(r.ns.Fd()), unix.CLONE_NEWNET))
		f()
	})
}

// onThread runs f on a thread that ends with it.
func onThread(t *testing.T, f func()) {
	t.Helper()
	var done sync.WaitGroup
	done.Go(func() {
		runtime.LockOSThread()
		f()
	})
	done.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
		runtime.Goexit()
	}
}

func linkUp(t *testing.T, name string) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, err)
	must(t, netlink.LinkSetUp(l))
}

func addAddr(t *testing.T, link, s string) {
	t.Helper()
	l, err := netlink.LinkByName(link)
	must(t, err)
	a, err := netlink.ParseAddr(s)
	must(t, err)
	must(t, netlink.AddrAdd(l, a))
}

// cluster is a coordinator that can be stopped and started again.
type cluster struct {
	t       *testing.T
	remote  remote
	dir     string
	Network conf.Network
	Term    time.Duration

	addr          string // of the HTTP server, once it has one
	stop          func()
	registrations atomic.Int64              // requests so far
	beforeWatch   func()                    // called before a stream begins; nil: nothing is
	answer        func(http.ResponseWriter) // to every registration, from the next start on; nil: the coordinator answers
	// register gets every registration, and what would serve it; nil: that does.
	register atomic.Pointer[func(http.Handler, http.ResponseWriter, *http.Request)]
}

// seedNetwork is the configuration that DC/OS comes with.
func seedNetwork() conf.Network {
	return conf.Network{
		VTEPMACOUI: "70:B3:D5:00:00:00", VTEPSubnet: prefix("44.128.0.0/20"), VTEPSubnet6: prefix("fd01:a::/64"),
		Overlays: []conf.Overlay{
			{Name: "dcos", Subnet: prefix("9.0.0.0/8"), Prefix: 24},
			{Name: "dcos6", Subnet6: prefix("fd01:b::/64"), Prefix6: 80},
		},
	}
}

// newCluster makes the underlay and starts a coordinator on it.
func newCluster(t *testing.T, network conf.Network) *cluster {
	t.Helper()
	c := &cluster{t: t, remote: newRemote(t), dir: t.TempDir(), Network: network}
	c.start()
	t.Cleanup(func() {
		if c.stop != nil {
			c.stop()
		}
	})
	return c
}

// start starts the coordinator, at the same address as before.
func (c *cluster) start() {
	t := c.t
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	store, err := bbolt.Open(filepath.Join(c.dir, "coordinator.db"), log)
	must(t, err)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	coord, err := coordinator.New(ctx, coordinator.Options{Network: c.Network, Store: store, Term: c.Term, Log: log, Version: "test"})
	must(t, err)
	var ln net.Listener
	if c.addr == "" {
		c.addr = "172.17.0.1:0"
	}
	// A program that the agent has just forked has the listener of before, too,
	// until it is another program.
	eventually(t, "the coordinator's address is free", func() error {
		c.remote.do(t, func() { ln, err = net.Listen("tcp", c.addr) })
		return err
	})
	c.addr = ln.Addr().String()
	handler, answer := coord.Handler(), c.answer
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == api.PathRegister {
			c.registrations.Add(1)
			if answer != nil {
				answer(w)
				return
			}
			if register := c.register.Load(); register != nil {
				(*register)(handler, w, r)
				return
			}
		}
		if r.URL.Path == api.PathWatch && c.beforeWatch != nil {
			c.beforeWatch()
		}
		handler.ServeHTTP(w, r)
	})}
	var running sync.WaitGroup
	running.Go(func() {
		if err := coord.Run(ctx); err != nil {
			t.Errorf("coordinator: %v", err)
		}
	})
	running.Go(func() { server.Serve(ln) })
	c.stop = func() {
		c.stop = nil
		cancel()
		server.Close()
		running.Wait()
		if err := store.Close(); err != nil {
			t.Errorf("close the store: %v", err)
		}
	}
}

// client returns a client of the coordinator.
func (c *cluster) client() *api.Client {
	c.t.Helper()
	transport := &http.Transport{}
	c.t.Cleanup(transport.CloseIdleConnections)
	client, err := api.NewClient(c.urls(), &http.Client{Transport: transport})
	must(c.t, err)
	return client
}

func (c *cluster) urls() []string { return []string{"http://" + c.addr} }

// join registers another host, which exists in the coordinator's books only.
func (c *cluster) join(id, ip string) conf.Lease {
	c.t.Helper()
	l, err := c.client().Register(c.t.Context(), api.RegisterRequest{AgentID: id, AgentIP: addr(ip), Version: "test"})
	must(c.t, err)
	return l
}

// testHost is one agent with its directories.
type testHost struct {
	t       *testing.T
	cluster *cluster
	dir     string
	opts    Options
	renew   time.Duration // between renewals; 0: as usual
	tune    func(*timing) // changes what else takes time; nil: nothing
	log     *lockedBuffer
	http    *http.Client // over the socket

	stop func()
}

func newHost(c *cluster) *testHost {
	t := c.t
	t.Helper()
	dir := t.TempDir()
	h := &testHost{t: t, cluster: c, dir: dir, log: &lockedBuffer{}}
	h.opts = Options{
		Datapath: fast.Kernel, // so that documents do not depend on the machine
		IP:       addr("172.17.0.4"), Bridges: []conf.Half{conf.Docker, conf.Mesos}, Cooling: 150 * time.Second,
		RunDir: filepath.Join(dir, "run"), StateDir: filepath.Join(dir, "state"),
		CNIConfDir: filepath.Join(dir, "cni"), UCRConfDir: filepath.Join(dir, "ucr"),
		Coordinator: c.client(), CoordinatorURLs: c.urls(),
		Log: slog.New(slog.NewTextHandler(h.log, nil)), Version: "1.2.3",
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", h.path(conf.SocketFile))
		},
	}
	h.http = &http.Client{Transport: transport}
	t.Cleanup(func() {
		if h.stop != nil {
			h.stop()
		}
		if t.Failed() {
			t.Logf("log of the agent:\n%s", h.log)
		}
	})
	return h
}

// start starts the agent, with times that suit a test.
func (h *testHost) start() {
	t := h.t
	t.Helper()
	a, err := New(h.opts)
	must(t, err)
	a.timing.backoffMin, a.timing.backoffMax = 20*time.Millisecond, 200*time.Millisecond
	a.timing.savePeers = 50 * time.Millisecond
	if h.renew != 0 {
		a.timing.renew = h.renew
	}
	if h.tune != nil {
		h.tune(&a.timing)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	h.stop = func() {
		h.stop = nil
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("agent: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("the agent does not stop")
		}
	}
	eventually(t, "agent answers", func() error {
		select {
		case err := <-done:
			done <- err
			t.Fatalf("agent ended: %v", err)
		default:
		}
		_, _, err := h.get(api.PathHealth)
		return err
	})
}

func (h *testHost) restart() {
	h.t.Helper()
	h.stop()
	h.start()
}

// path is a file in the run directory.
func (h *testHost) path(file string) string { return filepath.Join(h.opts.RunDir, file) }

// stored is a file in the state directory.
func (h *testHost) stored(file string) string { return filepath.Join(h.opts.StateDir, file) }

// get asks the agent over its socket.
func (h *testHost) get(path string) (code int, body string, err error) {
	resp, err := h.http.Get("http://agent" + path)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// ready waits until new containers can be attached.
func (h *testHost) ready() {
	h.t.Helper()
	eventually(h.t, "agent is ready", func() error {
		code, body, err := h.get(api.PathReady)
		if err == nil && code != http.StatusOK {
			err = errors.New(strings.TrimSpace(body))
		}
		return err
	})
}

// notReady waits until they cannot, and the reason says so.
func (h *testHost) notReady(why string) {
	h.t.Helper()
	eventually(h.t, "agent is not ready because of "+why, func() error {
		code, body, err := h.get(api.PathReady)
		if err == nil && (code != http.StatusServiceUnavailable || !strings.Contains(body, why)) {
			err = fmt.Errorf("readiness: %d %s", code, body)
		}
		return err
	})
}

// document is what the agent has published.
func (h *testHost) document() conf.State {
	h.t.Helper()
	var s conf.State
	must(h.t, conf.ReadJSON(h.path(conf.StateFile), &s))
	return s
}

// published waits for a document that f is content with.
func (h *testHost) published(what string, f func(conf.State) bool) conf.State {
	h.t.Helper()
	var s conf.State
	eventually(h.t, what, func() error {
		s = conf.State{}
		if err := conf.ReadJSON(h.path(conf.StateFile), &s); err != nil {
			return err
		}
		if !f(s) {
			b, _ := json.Marshal(s)
			return fmt.Errorf("published is %s", b)
		}
		return nil
	})
	return s
}

// id is the agent id.
func (h *testHost) id() string {
	h.t.Helper()
	b, err := os.ReadFile(h.stored(idFile))
	must(h.t, err)
	return strings.TrimSpace(string(b))
}

// statusAt waits until the coordinator knows what f is content with.
func (h *testHost) statusAt(what string, f func(map[string]conf.OverlayStatus) bool) {
	h.t.Helper()
	client := h.cluster.client()
	eventually(h.t, what, func() error {
		agents, err := client.Agents(h.t.Context())
		if err != nil {
			return err
		}
		i := slices.IndexFunc(agents, func(a api.Agent) bool { return a.AgentID == h.id() })
		if i < 0 {
			return errors.New("the coordinator does not know the agent")
		}
		if !f(agents[i].Status) {
			return fmt.Errorf("status is %v", agents[i].Status)
		}
		return nil
	})
}

func allOK(s map[string]conf.OverlayStatus) bool {
	for _, o := range s {
		if o.Status != conf.StatusOK {
			return false
		}
	}
	return len(s) > 0
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not in time: %v", what, err)
		}
		wait(t, 10*time.Millisecond)
	}
}

// wait is the pause between two looks at something.
func wait(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}

// hasRoute returns nil if the kernel has a route of ours to dst over the VTEP.
func hasRoute(dst netip.Prefix) error {
	family := netlink.FAMILY_V4
	if dst.Addr().Is6() {
		family = netlink.FAMILY_V6
	}
	vtep, err := netlink.LinkByName(conf.VTEPName)
	if err != nil {
		return err
	}
	routes, err := netlink.RouteListFiltered(family, &netlink.Route{LinkIndex: vtep.Attrs().Index}, netlink.RT_FILTER_OIF)
	if err != nil {
		return err
	}
	for _, r := range routes {
		if r.Dst != nil && r.Dst.String() == dst.String() {
			return nil
		}
	}
	return fmt.Errorf("no route to %s among %v", dst, routes)
}

// hasAddr returns nil if a link has an address.
func hasAddr(link, want string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return fmt.Errorf("%s: %w", link, err)
	}
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if a.IPNet.String() == want {
			return nil
		}
	}
	return fmt.Errorf("%s has %v, want %s", link, addrs, want)
}

// noLink returns nil if there is no link of that name.
func noLink(name string) error {
	_, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	return fmt.Errorf("link %s: %v", name, err)
}

// exists returns nil if the file is there, or, if not wanted, is not.
func exists(path string, wanted bool) error {
	_, err := os.Stat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if there := err == nil; there != wanted {
		return fmt.Errorf("%s: there: %t", path, there)
	}
	return nil
}

// lockedBuffer is a log that several goroutines write.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
