package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The overlays of the tests: one of each kind.
var grants = []conf.Grant{
	{Overlay: conf.Overlay{Name: "both"}, Subnet: netip.MustParsePrefix("10.64.0.0/24"), Subnet6: netip.MustParsePrefix("fd01:c::/80")},
	{Overlay: conf.Overlay{Name: "dcos"}, Subnet: netip.MustParsePrefix("9.0.1.0/24")},
	{Overlay: conf.Overlay{Name: "dcos6"}, Subnet6: netip.MustParsePrefix("fd01:b::/80")},
}

func leased(bridges ...conf.Half) []conf.AgentOverlay {
	return conf.Lease{Bridges: bridges, Grants: grants}.AgentOverlays(nil)
}

func publishedState(t *testing.T) conf.State {
	t.Helper()
	boot, err := conf.BootID()
	if err != nil {
		t.Fatal(err)
	}
	return conf.State{
		BootID: boot, MTU: 1450, CoolingSeconds: 150, Overlays: leased(conf.Halves[:]...),
		Lease: conf.LeaseState{ExpiresBoottime: int64(conf.Boottime() + time.Hour)},
	}
}

// A rig is a driver on a socket of its own, with the address stores of a host
// whose agent has published.
type rig struct {
	t      *testing.T
	dir    string
	driver *driver
	client *http.Client
	state  conf.State
}

func newRig(t *testing.T) *rig {
	t.Helper()
	dir := tempDir(t)
	c, err := newClient("unix://" + filepath.Join(dir, "docker.sock"))
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, dir: dir, driver: newDriver(dir, c, slog.New(slog.DiscardHandler)), state: publishedState(t)}
	r.driver.patience = 0
	t.Cleanup(c.http.CloseIdleConnections)
	r.publish()

	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- r.driver.serve(ctx, r.socket(), func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	r.client = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", r.socket())
	}}}
	t.Cleanup(func() {
		r.client.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return r
}

// tempDir is short, because a socket's path is, and not named as the labs of the
// integration tests are: those of processes that are gone are swept away.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ovk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (r *rig) socket() string { return filepath.Join(r.dir, "plugins", socketFile) }

func (r *rig) publish() {
	r.t.Helper()
	if err := conf.WriteJSON(filepath.Join(r.dir, conf.StateFile), r.state, 0o644); err != nil {
		r.t.Fatal(err)
	}
}

// call is one request as dockerd makes it. The answer is its JSON text, or the
// error's text.
func (r *rig) call(method, in string) string {
	r.t.Helper()
	res, err := r.client.Post("http://plugin/"+method, "application/vnd.docker.plugins.v1.2+json", strings.NewReader(in))
	if err != nil {
		r.t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	if res.StatusCode == http.StatusOK {
		return string(bytes.TrimSpace(b))
	}
	var refusal struct{ Err string }
	if err := json.Unmarshal(b, &refusal); err != nil || refusal.Err == "" {
		r.t.Fatalf("%s: %s: %s", method, res.Status, b)
	}
	return "refused: " + refusal.Err
}

func (r *rig) expect(method, in, want string) {
	r.t.Helper()
	if got := r.call(method, in); got != want {
		r.t.Errorf("%s %s\n got %s\nwant %s", method, in, got, want)
	}
}

// request asks for an address.
func (r *rig) request(pool, addr string) string {
	r.t.Helper()
	got := r.call("IpamDriver.RequestAddress", fmt.Sprintf(`{"PoolID":%q,"Address":%q,"Options":{}}`, pool, addr))
	var out addressAnswer
	if json.Unmarshal([]byte(got), &out) == nil {
		return out.Address
	}
	return got
}

func (r *rig) release(pool, addr string) {
	r.t.Helper()
	r.expect("IpamDriver.ReleaseAddress", fmt.Sprintf(`{"PoolID":%q,"Address":%q}`, pool, addr), "{}")
}

func (r *rig) with(overlay string, f func(*ipam.Store)) {
	r.t.Helper()
	s, err := r.driver.stores.open(r.t.Context(), overlay, time.Minute)
	if err != nil {
		r.t.Fatal(err)
	}
	defer s.Close()
	f(s)
}

// filed are the addresses in an overlay's store.
func (r *rig) filed(overlay string) (out []string) {
	r.t.Helper()
	r.with(overlay, func(s *ipam.Store) {
		recs, err := s.List(r.t.Context())
		if err != nil {
			r.t.Fatal(err)
		}
		for _, rec := range recs {
			for _, a := range rec.Addrs {
				out = append(out, a.String())
			}
		}
	})
	slices.Sort(out)
	return out
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

const (
	both4 = "overlay/both/10.64.0.128/25"
	both6 = "overlay/both/fd01:c::8000:0:0/81"
	dcos  = "overlay/dcos/9.0.1.128/25"
)

func TestDriverFormalities(t *testing.T) {
	r := newRig(t)
	r.expect("Plugin.Activate", "", `{"Implements":["IpamDriver"]}`)
	r.expect("IpamDriver.GetCapabilities", "", `{"RequiresMACAddress":false,"RequiresRequestReplay":true}`)
	r.expect("IpamDriver.GetDefaultAddressSpaces", "{}", `{"GlobalDefaultAddressSpace":"OverlayGlobal","LocalDefaultAddressSpace":"OverlayLocal"}`)
	r.expect("IpamDriver.ReleasePool", `{"PoolID":"`+dcos+`"}`, "{}")
	if got := r.call("IpamDriver.RequestPool", "{"); !strings.HasPrefix(got, "refused: read the request:") {
		t.Errorf("half a request: %s", got)
	}
	fi, err := os.Stat(r.socket())
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want it for root alone", fi.Mode(), err)
	}
	if res, err := r.client.Get("http://plugin/Plugin.Activate"); err != nil || res.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET: %v, %v", res, err)
	} else {
		res.Body.Close()
	}
}

func TestRequestPool(t *testing.T) {
	r := newRig(t)
	const here = "(here are: both 10.64.0.128/25 and fd01:c::8000:0:0/81; dcos 9.0.1.128/25; dcos6 fd01:b::8000:0:0/81)"
	for _, tt := range []struct{ name, in, want string }{
		{"by name", `{"Pool":"9.0.1.128/25","Options":{"overlay":"dcos"}}`, dcos},
		{"by subnet alone", `{"Pool":"9.0.1.128/25"}`, dcos},
		{"with a host's address", `{"Pool":"9.0.1.130/25","Options":{"overlay":"dcos"}}`, dcos},
		{"IPv6", `{"Pool":"fd01:c::8000:0:0/81","V6":true,"Options":{"overlay":"both"}}`, both6},
		{"a part", `{"Pool":"9.0.1.128/25","SubPool":"9.0.1.192/26","Options":{"overlay":"dcos"}}`, dcos + "/9.0.1.192/26"},
		{"IPv4 beside an IPv6 overlay", `{"Pool":"169.254.16.0/22","Options":{"overlay":"dcos6"}}`, "overlay/dcos6/169.254.16.0/22"},

		{"nothing", `{}`, "refused: no overlay is named; name one with --ipam-opt overlay=NAME " + here},
		{"unknown", `{"Options":{"overlay":"x"}}`, `refused: overlay "x" has no Docker half on this host; name one with --ipam-opt overlay=NAME ` + here},
		{"unknown subnet", `{"Pool":"9.0.2.0/25"}`, "refused: subnet 9.0.2.0/25 is no overlay's Docker half on this host; name one with --ipam-opt overlay=NAME " + here},
		{"the other half", `{"Pool":"9.0.1.0/25","Options":{"overlay":"dcos"}}`,
			"refused: subnet 9.0.1.0/25 is not the one that overlay dcos has on this host for Docker: 9.0.1.128/25; give that one (for a part of it there is --ip-range)"},
		{"subnet of another overlay", `{"Pool":"10.64.0.128/25","Options":{"overlay":"dcos"}}`,
			"refused: subnet 10.64.0.128/25 is not the one that overlay dcos has on this host for Docker: 9.0.1.128/25; give that one (for a part of it there is --ip-range)"},
		{"no subnet", `{"Options":{"overlay":"both"}}`, "refused: a network of overlay both has to name its subnet: --subnet 10.64.0.128/25 --subnet fd01:c::8000:0:0/81"},
		{"no IPv6", `{"V6":true,"Options":{"overlay":"dcos"}}`, "refused: overlay dcos has no IPv6 here, only 9.0.1.128/25; leave --ipv6 out"},
		{"no IPv4", `{"Options":{"overlay":"dcos6"}}`, "refused: overlay dcos6 has no IPv4 here, only fd01:b::8000:0:0/81; an engine that insists on IPv4 may have a part of 169.254.0.0/16, as in --subnet " + bystander("dcos6", nil).String()},
		{"a part of something else", `{"Pool":"9.0.1.128/25","SubPool":"9.0.1.0/26","Options":{"overlay":"dcos"}}`, "refused: ip-range 9.0.1.0/26 is not a part of 9.0.1.128/25"},
		{"no subnet at all", `{"Pool":"here"}`, `refused: subnet "here" is not a subnet with addresses for containers, as in 9.0.1.128/25`},
		{"a subnet without containers", `{"Pool":"9.0.1.128/31"}`, `refused: subnet "9.0.1.128/31" is not a subnet with addresses for containers, as in 9.0.1.128/25`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := r.call("IpamDriver.RequestPool", tt.in)
			var out poolAnswer
			if json.Unmarshal([]byte(got), &out) == nil {
				got = out.PoolID
				p, err := parsePool(got)
				if err != nil || p.id() != got || p.prefix.String() != out.Pool {
					t.Errorf("answer %+v: %v", out, err)
				}
			}
			equal(t, tt.in, got, tt.want)
		})
	}
	if _, err := os.Stat(filepath.Join(r.dir, conf.IPAMDir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("asking for pools has made address stores: %v", err)
	}
}

func TestRequestAddress(t *testing.T) {
	r := newRig(t)
	equal(t, "first", r.request(dcos, ""), "9.0.1.130/25")
	equal(t, "next", r.request(dcos, ""), "9.0.1.131/25")
	equal(t, "by name", r.request(dcos, "9.0.1.200"), "9.0.1.200/25")
	equal(t, "IPv4 of both", r.request(both4, ""), "10.64.0.130/25")
	equal(t, "IPv6 of both", r.request(both6, ""), "fd01:c::8000:0:2/81")
	equal(t, "a part", r.request(dcos+"/9.0.1.192/26", ""), "9.0.1.192/25")
	equal(t, "beside IPv6", r.request("overlay/dcos6/169.254.16.0/22", ""), "169.254.16.2/22")
	equal(t, "in use", r.request(dcos, "9.0.1.192"), "9.0.1.192/25") // dockerd is not there to ask: it may be starting
	equal(t, "in use, again", r.request(dcos, "9.0.1.192"), "refused: address 9.0.1.192 is in use by a container of Docker")
	equal(t, "gateway", r.request(dcos, "9.0.1.129"), "refused: address 9.0.1.129 is the gateway of 9.0.1.128/25")
	equal(t, "elsewhere", r.request(dcos, "9.0.1.3"), "refused: address 9.0.1.3 is outside 9.0.1.128/25")
	equal(t, "no address", r.request(dcos, "x"), `refused: address "x": want 9.0.1.5 or 9.0.1.5/25`)

	// Whoever comes through CNI meets the same half.
	cni := ipam.Request{
		Attachment: conf.Attachment{Network: "dcos", ContainerID: "c", IfName: "eth0"}, Half: conf.Docker,
		Ranges: halves(r.state.Overlays[1]),
	}
	r.with("dcos", func(s *ipam.Store) {
		got, err := s.Allocate(t.Context(), cni)
		equal(t, "CNI", fmt.Sprint(got.Addrs, err), "[9.0.1.132] <nil>")
	})
	equal(t, "what CNI has", r.request(dcos, "9.0.1.132"), "refused: address 9.0.1.132 is in use by dcos/c/eth0")

	r.release(dcos, "9.0.1.130")
	r.release(dcos, "9.0.1.130")
	r.release(dcos, "9.0.1.129")
	r.release(dcos, "9.0.1.132") // not Docker's to give back
	r.release("overlay/gone/9.9.9.0/25", "9.9.9.2")
	equal(t, "left", r.filed("dcos"), []string{"9.0.1.131", "9.0.1.132", "9.0.1.192", "9.0.1.200"})
	equal(t, "released, by name", r.request(dcos, "9.0.1.130"), "9.0.1.130/25")
}

func TestGateway(t *testing.T) {
	r := newRig(t)
	if err := os.Remove(filepath.Join(r.dir, conf.StateFile)); err != nil {
		t.Fatal(err) // an answer that never changes needs no lease
	}
	ask := func(pool, addr string) string {
		return r.call("IpamDriver.RequestAddress", fmt.Sprintf(`{"PoolID":%q,"Address":%q,"Options":{"RequestAddressType":"com.docker.network.gateway"}}`, pool, addr))
	}
	equal(t, "ours to choose", ask(dcos, ""), `{"Address":"9.0.1.129/25","Data":{}}`)
	equal(t, "the right one", ask(both6, "fd01:c::8000:0:1"), `{"Address":"fd01:c::8000:0:1/81","Data":{}}`)
	equal(t, "of a part", ask(dcos+"/9.0.1.192/26", ""), `{"Address":"9.0.1.129/25","Data":{}}`)
	equal(t, "another", ask(dcos, "9.0.1.140"), "refused: gateway 9.0.1.140: that of 9.0.1.128/25 is 9.0.1.129 in every overlay; give that one, or none")
	if _, err := os.Stat(filepath.Join(r.dir, conf.IPAMDir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a gateway is stored: %v", err)
	}
}

// TestNoAddressWithoutALease: what keeps the CNI programs from giving out
// addresses keeps the driver.
func TestNoAddressWithoutALease(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*conf.State)
		want   string // beginning
	}{
		{"ended", func(s *conf.State) { s.Lease.ExpiresBoottime = 1 }, "the lease of this host has run out"},
		{"lost", func(s *conf.State) { s.Lease.Lost = "to h2" }, "the lease of this host is lost: to h2"},
		{"earlier boot", func(s *conf.State) { s.BootID = "x" }, filepath.Join("%s", conf.StateFile) + " is from before the last reboot"},
		{"overlay gone", func(s *conf.State) { s.Overlays = nil }, "overlay dcos has no Docker half on this host any more"},
		{"no such half", func(s *conf.State) { s.Overlays = leased(conf.Mesos) }, "overlay dcos has no Docker half on this host any more"},
		{"other subnet", func(s *conf.State) {
			s.Overlays[1].Subnet = netip.MustParsePrefix("9.0.7.0/24")
			s.Overlays[1].DockerBridge.IP = netip.MustParsePrefix("9.0.7.128/25")
			s.Overlays[1].MesosBridge = nil
		}, "the network was made for 9.0.1.128/25, and overlay dcos has 9.0.7.128/25 on this host now"},
		{"drained", func(s *conf.State) { s.Overlays[1].Info.Draining = true }, "overlay dcos is being drained: no new container is attached to it on any host"},
		{"not ready", func(s *conf.State) {
			s.Overlays[1].State = &conf.OverlayStatus{Status: conf.StatusFailed, Error: "no bridge"}
		}, "overlay dcos is not ready on this host: no bridge"},
		{"being set up", func(s *conf.State) {
			s.Overlays[1].State = &conf.OverlayStatus{Status: conf.StatusConfiguring}
		}, "overlay dcos is not ready on this host: the agent is still setting it up"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t)
			first := r.request(dcos, "")
			tt.change(&r.state)
			r.publish()
			want := "refused: " + strings.ReplaceAll(tt.want, "%s", r.dir)
			if got := r.request(dcos, ""); !strings.HasPrefix(got, want) {
				t.Errorf("got %s, want %s", got, want)
			}
			// Giving back always works.
			r.release(dcos, strings.TrimSuffix(first, "/25"))
			equal(t, "left", r.filed("dcos"), []string(nil))
		})
	}
}

// TestWaitsForTheAgent: dockerd asks once, and the agent may have started with it.
func TestWaitsForTheAgent(t *testing.T) {
	r := newRig(t)
	r.driver.patience = time.Hour
	good := r.state
	r.state.BootID = "of an earlier boot"
	r.publish()
	answer := make(chan string)
	go func() { answer <- r.request(dcos, "") }()
	select {
	case got := <-answer:
		t.Fatalf("answered %s", got)
	case <-time.After(3 * pollPause):
	}
	r.state = good
	r.publish()
	equal(t, "once published", <-answer, "9.0.1.130/25")
}

func TestForeignPoolIDs(t *testing.T) {
	r := newRig(t)
	for _, id := range []string{
		"", "LocalDefault/172.17.0.0/16", "overlay/dcos", "overlay/dcos/9.0.1.128", "overlay/../9.0.1.128/25", "overlay/dcos/9.0.1.128/25/x",
		"overlay/dcos/9.0.1.128/99", "overlay/dcos/9.0.1.128/25/9.0.1.0/26", "other/dcos/9.0.1.128/25",
	} {
		if got := r.request(id, ""); !strings.HasPrefix(got, "refused: pool "+fmt.Sprintf("%q", id)) {
			t.Errorf("pool %q: %s", id, got)
		}
	}
}

func TestExhausted(t *testing.T) {
	r := newRig(t)
	for _, want := range []string{"9.0.1.252/25", "9.0.1.253/25", "9.0.1.254/25"} {
		equal(t, "of a part", r.request(dcos+"/9.0.1.252/30", ""), want)
	}
	equal(t, "full", r.request(dcos+"/9.0.1.252/30", ""),
		"refused: overlay dcos: no address left in the docker half 9.0.1.252/30: 3 used, 0 cooling, 3 in all; remove containers or give the overlay a shorter prefix")
}

// TestIPv6OfTheFirstBlockAlone: Docker gets no IPv6 address of a further block, and is
// told so at once, also where there is more to be had.
func TestIPv6OfTheFirstBlockAlone(t *testing.T) {
	r := newRig(t)
	p := netip.MustParsePrefix
	six := conf.Grant{Overlay: conf.Overlay{Name: "six"}, Subnet6: p("fd01:d::/124"), Blocks: []conf.Block{{Subnet6: p("fd01:d::10/124")}}}
	r.state.Overlays = conf.Lease{Bridges: conf.Halves[:], Grants: []conf.Grant{six}}.AgentOverlays(nil)
	r.state.Room = []string{"six"}
	r.publish()
	const id = "overlay/six/fd01:d::8/125"
	for i := range conf.Containers(p("fd01:d::8/125")) {
		equal(t, "of the first block", r.request(id, ""), fmt.Sprintf("fd01:d::%x/125", 10+i))
	}
	began := time.Now()
	if got := r.request(id, ""); !strings.Contains(got, "Docker has IPv6 addresses of the first subnet of an overlay alone") || time.Since(began) > roomPatience/2 {
		t.Errorf("%s (after %v)", got, time.Since(began))
	}
}

func TestBystanders(t *testing.T) {
	metadata := netip.MustParseAddr("169.254.169.254")
	var taken []netip.Prefix
	for {
		p := bystander("dcos6", taken)
		if !p.IsValid() {
			break
		}
		if !isBystander(p) || p.Bits() != bystanderBits || p.Contains(metadata) || overlaps(p, taken) {
			t.Fatalf("%s beside %v", p, taken)
		}
		taken = append(taken, p)
	}
	equal(t, "blocks", len(taken), 64-3)
	equal(t, "follows from the name", bystander("dcos6", taken[1:]).String(), taken[0].String())
	if bystander("a", nil) == bystander("b", nil) {
		t.Error("two overlays begin at one block")
	}
}

// An address of a further block comes with a length that has the gateway of the
// network on the link, and no shorter one.
func TestWithGateway(t *testing.T) {
	pool := netip.MustParsePrefix("9.0.1.128/25")
	for a, want := range map[string]string{
		"9.0.1.130": "9.0.1.130/25", "9.0.1.2": "9.0.1.2/24", "9.0.3.200": "9.0.3.200/22",
		"9.1.0.130": "9.1.0.130/15", "9.0.2.130": "9.0.2.130/22",
	} {
		got := withGateway(netip.MustParseAddr(a), pool)
		equal(t, a, got.String(), want)
		equal(t, a+" and the gateway", got.Contains(conf.Gateway(pool)), true)
	}
}
