package page

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// forward takes connections here and hands them to a port of 127.0.0.1 in a
// namespace, as ssh -L does.
func forward(t *testing.T, in *lab.Netns, port string) string {
	t.Helper()
	to, err := netip.ParseAddrPort("127.0.0.1:" + port)
	must(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	var open sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	open.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			open.Go(func() {
				defer c.Close()
				d, err := in.Dial(ctx, to)
				if err != nil {
					return
				}
				defer d.Close()
				defer context.AfterFunc(ctx, func() { c.Close(); d.Close() })()
				open.Go(func() { io.Copy(d, c); d.Close() })
				io.Copy(c, d)
			})
		}
	})
	t.Cleanup(func() { cancel(); l.Close(); open.Wait() })
	return l.Addr().String()
}

// shown is an overlayctl page that runs on a host.
type shown struct {
	link string // as seen from here
	cmd  *exec.Cmd
}

// showPage logs in as a reader on a host, and starts overlayctl page there.
func showPage(t *testing.T, s *lab.Seed) *shown {
	t.Helper()
	home := t.TempDir()
	overlayctl := filepath.Join(binDir, "overlayctl")
	token, err := s.Overlayctl(t.Context(), "token", "create", "--role", "reader")
	must(t, err)
	login := s.Master.Command(t.Context(), overlayctl, "login", "--coordinator", s.Coordinator.URL, "--token", strings.TrimSpace(token))
	login.Env = append(os.Environ(), "HOME="+home, "XDG_CONFIG_HOME=")
	if out, err := login.CombinedOutput(); err != nil {
		t.Fatalf("log in: %v\n%s", err, out)
	}
	cmd := s.Master.Command(t.Context(), overlayctl, "page", "--coordinator", s.Coordinator.URL)
	cmd.Env = login.Env
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill() }) // if it has not ended
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		cmd.Wait()
		t.Fatalf("overlayctl page: %v\n%s", err, &stderr)
	}
	link, err := url.Parse(strings.TrimSpace(line))
	must(t, err)
	link.Host = forward(t, s.Master.Netns, link.Port())
	return &shown{link.String(), cmd}
}

// TestRealHosts: the page of a coordinator with identities, through overlayctl page,
// about hosts and containers that are real.
func TestRealHosts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces")
	}
	br := browser(t)
	b, err := os.ReadFile(filepath.Join(top, "conf/examples/overlay.yaml"))
	must(t, err)
	// Beside the example's, one with room for five containers in each half of a host.
	network := strings.Replace(string(b), "overlays:\n", "overlays:\n     - {name: small, subnet: 10.77.0.0/16, prefix: 28, blocks_per_agent: 1}\n", 1)
	s, err := lab.NewSeed(t.Context(), lab.Options{Bin: binDir, CNITool: filepath.Join(binDir, "cnitool"), Secure: true}, network)
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			s.Logs(os.Stderr, 30)
		}
		must(t, s.Close())
	})
	must(t, s.Up(t.Context()))
	if code, body := status(t, s.Outside.Netns, s.Coordinator.URL+"/"); code != 401 || !strings.Contains(body, "overlayctl page") {
		t.Errorf("without a certificate: %d %s", code, body)
	}
	p := showPage(t, s)
	v := open(t, br, 1280, 800, "ERR_CONNECTION", "ERR_EMPTY_RESPONSE", "ERR_INCOMPLETE_CHUNKED_ENCODING")
	v.visit(p.link)
	v.wait("the page behind the link", "location.pathname === '/' && document.querySelectorAll('.card').length === 3")
	v.wait("all hosts", "document.querySelector('.tiles').innerText.includes('all connected')")
	v.wait("nothing wrong", "document.querySelector('.fine')")
	other := open(t, br, 1280, 800, "403", "401") // the latter for an icon
	other.visit(p.link)
	if text := other.text("body"); !strings.Contains(text, "used already") {
		t.Errorf("the link a second time shows %q", text)
	}

	v.goTo("#/agents")
	v.wait("three agents with what they say", "[...document.querySelectorAll('.vt-spacer .c-mtu')].filter(e => Number(e.innerText) > 1200).length === 3")
	if text := v.text(".vt-spacer"); strings.Count(text, "kernel")+strings.Count(text, "ebpf") != 3 || strings.Count(text, "now") != 3 {
		t.Errorf("the agents are %q", text)
	}
	container(t, s, v)
	agentGone(t, s, v)
	filling(t, s, v)

	must(t, p.cmd.Process.Signal(syscall.SIGINT))
	began := time.Now()
	if err := p.cmd.Wait(); err != nil || time.Since(began) > 5*time.Second {
		t.Errorf("overlayctl page ended after %s: %v", time.Since(began), err)
	}
	v.wait("that it says so", "document.querySelector('#live').innerText === 'not connected'")
}

// goTo chooses a view.
func (b *tab) goTo(hash string) {
	b.t.Helper()
	eval[bool](b, "(location.hash = "+js(hash)+", true)")
}

// container: one is attached by the real plugin, and detached, while somebody looks.
func container(t *testing.T, s *lab.Seed, v *tab) {
	v.goTo("#/containers")
	v.wait("no container", "document.querySelector('.vt-none').innerText === 'No container matches.'")
	began := time.Now()
	c, err := s.Place(t.Context(), lab.Placement{Agent: 0, Name: "real", Overlay: "dcos", Half: lab.Docker})
	must(t, err)
	v.wait("the container with its address", "[...document.querySelectorAll('.vt-spacer .address')].some(e => e.innerText === "+js(c.Addr().String())+")")
	t.Logf("a container was seen %s after its ADD was begun", time.Since(began).Round(time.Millisecond))
	v.goTo("#/events")
	v.wait("the event", "document.querySelector('.vt-spacer').innerText.includes("+js(c.Addr().String())+")")
	half := netip.PrefixFrom(c.Addr(), 25).Masked()
	v.goTo("#/map?overlay=dcos&at=" + url.QueryEscape(half.String()))
	v.wait("it on the map", "document.querySelector('.map-table').innerText.includes("+js(c.Addr().String())+")")
	v.goTo("#/containers")
	must(t, c.Del(t.Context()))
	v.wait("that it has gone", "document.querySelector('.vt-none').innerText === 'No container matches.' && !document.querySelector('.vt-none').hidden")
}

// agentGone: an agent ends, which is wrong, until it is back.
func agentGone(t *testing.T, s *lab.Seed, v *tab) {
	v.goTo("#/overview")
	h := s.Agents[1]
	must(t, h.Proc.Stop())
	v.wait("that it is missed", "document.querySelector('.findings')?.innerText.includes("+js("at "+h.Underlay().String()+" is not connected")+")")
	must(t, s.StartAgent(h))
	v.wait("that all is well", "document.querySelector('.fine') && document.querySelector('.tiles').innerText.includes('all connected')")
}

func status(t *testing.T, from *lab.Netns, url string) (int, string) {
	t.Helper()
	out, err := from.Run(t.Context(), "curl", "-sk", "-w", "\n%{http_code}", url)
	must(t, err)
	i := strings.LastIndexByte(strings.TrimSpace(out), '\n')
	code := 0
	for _, d := range strings.TrimSpace(out[i+1:]) {
		code = 10*code + int(d-'0')
	}
	return code, out[:i]
}
