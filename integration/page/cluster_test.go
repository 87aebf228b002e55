package page

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// binDir has the programs, as users get them: what is measured here is not the race
// detector.
var binDir string

func TestMain(m *testing.M) {
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration/page:", err)
		code = 1
	}
	os.Exit(code)
}

func buildAndRun(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "overlay-page-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	binDir = dir
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/", "./overlayd", "./overlayd/overlayctl", "./plugins/m-overlay", "./plugins/d-overlay", "./ipam/overlay-ipam",
		"github.com/containernetworking/cni/cnitool")
	cmd.Dir = top
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return m.Run(), nil
}

const config = `
vtep_subnet: 44.128.0.0/16
vtep_subnet6: fd01:a::/64
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: dcos, subnet: 9.0.0.0/8, prefix: 24}
  - {name: prod, subnet: 10.64.0.0/12, prefix: 26}
  - {name: dcos6, subnet6: "fd01:b::/64", prefix6: 80}
`

// coordinator is a real one, without identities.
type coordinator struct {
	t   *testing.T
	url string
	hc  *http.Client

	process *os.Process
	killed  bool
}

func startCoordinator(t *testing.T, flags ...string) *coordinator {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "overlay.yaml")
	must(t, os.WriteFile(file, []byte(config), 0o644))
	cmd := exec.Command(filepath.Join(binDir, "overlayd"), "coordinator", "--config", file, "--listen", "127.0.0.1:0", "--state-dir", dir, "--insecure")
	cmd.Args = append(cmd.Args, flags...)
	stderr, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	c := &coordinator{t: t, process: cmd.Process, hc: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}}
	var log strings.Builder
	var mu sync.Mutex
	addr := make(chan string, 1)
	read := make(chan struct{})
	go func() {
		defer close(read)
		listening := regexp.MustCompile(`msg=listening addr=(\S+)`)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			mu.Lock()
			log.WriteString(lines.Text() + "\n")
			mu.Unlock()
			if m := listening.FindStringSubmatch(lines.Text()); m != nil {
				addr <- m[1]
			}
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		<-read
		if err := cmd.Wait(); err != nil && !c.killed {
			t.Errorf("the coordinator: %v\n%s", err, &log)
		}
	})
	select {
	case a := <-addr:
		c.url = "http://" + a
	case <-time.After(patience):
		mu.Lock()
		defer mu.Unlock()
		t.Fatalf("the coordinator does not begin to listen:\n%s", &log)
	}
	return c
}

func (c *coordinator) post(ctx context.Context, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := c.hc.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("POST %s: %s: %.300s", path, resp.Status, b)
	}
	if err == nil && out != nil {
		err = json.Unmarshal(b, out)
	}
	return err
}

// agent is a simulated one: it registers, watches and reports.
type agent struct {
	c        *coordinator
	id       string
	ip       netip.Addr
	n        int
	overlays []struct {
		Overlay         struct{ Name string }
		Subnet, Subnet6 netip.Prefix
	}
	sequence uint64
	problems []string
}

type object map[string]any

// subnet is what the agent has of an overlay.
func (a *agent) subnet(overlay string) netip.Prefix {
	for _, o := range a.overlays {
		if o.Overlay.Name == overlay {
			return o.Subnet
		}
	}
	return netip.Prefix{}
}

func (a *agent) register(ctx context.Context) error {
	var lease struct{ Overlays json.RawMessage }
	err := a.c.post(ctx, "/v1/register", object{"agent_id": a.id, "agent_ip": a.ip, "bridges": []string{"mesos", "docker"}, "version": fmt.Sprintf("1.%d.0", a.n%3), "instance": "one"}, &lease)
	if err != nil {
		return err
	}
	return json.Unmarshal(lease.Overlays, &a.overlays)
}

// perHalf is how many addresses of a half of dcos containers can have.
const perHalf = 125

// attachment is the k-th container of the agent.
func (a *agent) attachment(k int, name string) object {
	half, base := "mesos", 2
	if k%2 == 1 {
		half, base = "docker", 130
	}
	addr := a.subnet("dcos").Addr().As4()
	addr[3] += byte(base + k/2)
	return object{
		"network": "dcos", "id": fmt.Sprintf("%08x%024x%032x", a.n*0x9e37+k, k, a.n), "ifname": "eth0", "overlay": "dcos", "half": half,
		"addresses": []string{netip.AddrFrom4(addr).String()}, "since": time.Now().Add(-time.Duration(a.n*k%9000) * time.Minute).Unix(),
		"runtime": []string{"docker", "containerd", "podman", "mesos"}[k%4], "name": name,
	}
}

// usage is how full the halves are with so many containers.
func (a *agent) usage(n int) []object {
	var out []object
	for h, half := range []string{"mesos", "docker"} {
		used := (n + 1 - h) / 2
		p := netip.PrefixFrom(a.subnet("dcos").Addr(), 25)
		if h == 1 {
			b := p.Addr().As4()
			b[3] += 128
			p = netip.PrefixFrom(netip.AddrFrom4(b), 25)
		}
		cooling := min(a.n%7, perHalf-used)
		out = append(out, object{"overlay": "dcos", "half": half, "subnet": p, "total": perHalf, "used": used, "cooling": cooling, "free": perHalf - used - cooling})
	}
	return out
}

// report tells what is attached. A snapshot tells everything.
func (a *agent) report(ctx context.Context, snapshot bool, put []object, gone []string, usage []object) error {
	a.sequence++
	r := object{"agent_id": a.id, "instance": "one", "sequence": a.sequence, "snapshot": snapshot, "put": put, "delete": gone, "usage": usage}
	if snapshot {
		r["problems"] = a.problems
		r["host"] = object{"mtu": 1450, "datapath": []string{"ebpf", "kernel"}[a.n%2], "drift": a.n % 5}
	}
	return a.c.post(ctx, "/v1/attachments", r, nil)
}

func (a *agent) status(ctx context.Context) error {
	overlays := object{}
	for _, o := range a.overlays {
		overlays[o.Overlay.Name] = object{"status": "STATUS_OK"}
	}
	if a.n%701 == 300 {
		overlays["dcos"] = object{"status": "STATUS_FAILED", "error": "bridge m-dcos is there and not ours"}
	}
	return a.c.post(ctx, "/v1/status", object{"agent_id": a.id, "overlays": overlays}, nil)
}

// hostile are names that must stay text.
var hostile = []string{
	`<img src=x onerror=window.pwned=1>`, `"><script>window.pwned=1</script>`, "<svg onload=window.pwned=1>", "javascript:window.pwned=1", "{{constructor.constructor('window.pwned=1')()}}",
	"web\u202egnp.exe", "two\nlines", "' onmouseover='window.pwned=1",
}

// join makes agents with so many containers each, all at once, and keeps all but
// a few connected until the test ends.
func (c *coordinator) join(agents, containers int) []*agent {
	c.t.Helper()
	list := make([]*agent, agents)
	group, ctx := errgroup.WithContext(c.t.Context())
	group.SetLimit(64)
	for i := range list {
		a := &agent{c: c, n: i, id: fmt.Sprintf("host-%04d", i), ip: netip.AddrFrom4([4]byte{172, 20, byte(i / 250), byte(i%250 + 1)})}
		if i%997 == 100 {
			a.problems = []string{"docker does not answer on unix:///var/run/docker.sock: containers that it attaches get no addresses"}
		}
		list[i] = a
		group.Go(func() error {
			if err := a.register(ctx); err != nil {
				return err
			}
			n := containers - containers/2 + (i*37)%(containers+1) // so that halves differ
			switch {
			case i < 2 || i == agents-1:
				n = containers
			case i%40 == 7:
				n = 2*perHalf - i%31 // full, or nearly
			}
			var put []object
			for k := range n {
				name := fmt.Sprintf("%s-%d-%d", []string{"web", "db", "cache", "worker"}[(i+k)%4], i, k)
				if i == 0 && k < len(hostile) {
					name = hostile[k]
				}
				put = append(put, a.attachment(k, name))
			}
			if err := a.report(ctx, true, put, nil, a.usage(n)); err != nil {
				return err
			}
			return a.status(ctx)
		})
	}
	must(c.t, group.Wait())
	c.connect(list)
	return list
}

// connect has agents watch. They begin where the first one is, for nobody needs the
// peers of so many.
func (c *coordinator) connect(list []*agent) {
	c.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var open sync.WaitGroup
	c.t.Cleanup(func() { cancel(); open.Wait() })
	watch := func(a *agent, query url.Values) (*bufio.Reader, error) {
		query.Set("agent", a.id)
		query.Set("instance", "one")
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url+"/v1/watch?"+query.Encode(), nil)
		if err != nil {
			return nil, err
		}
		resp, err := c.hc.Do(req)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode != http.StatusOK {
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			return nil, fmt.Errorf("watch: %s: %s", resp.Status, b)
		}
		r := bufio.NewReaderSize(resp.Body, 4096)
		open.Go(func() {
			<-ctx.Done()
			resp.Body.Close()
		})
		return r, nil
	}
	first, err := watch(list[0], url.Values{})
	must(c.t, err)
	line, err := first.ReadBytes('\n')
	must(c.t, err)
	var event struct {
		Revision uint64
		Run      string
	}
	must(c.t, json.Unmarshal(line, &event))
	var group errgroup.Group
	group.SetLimit(64)
	for i, a := range list {
		if i == 0 || i%401 == 400 {
			continue // the latter are gone
		}
		group.Go(func() error {
			r, err := watch(a, url.Values{"revision": {fmt.Sprint(event.Revision)}, "run": {event.Run}})
			if err != nil {
				return err
			}
			open.Go(func() {
				if _, err := io.Copy(io.Discard, r); err != nil && !errors.Is(err, context.Canceled) && ctx.Err() == nil {
					c.t.Logf("the stream of %s: %v", a.id, err)
				}
			})
			return nil
		})
	}
	must(c.t, group.Wait())
}
