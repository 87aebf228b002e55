//go:build engines

package engines

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

const referenceList = `{
  "cniVersion": "1.0.0",
  "name": "reference",
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
     "ipam": {"type": "host-local",
              "ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "fd00:9::/64"}]],
              "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}`

// TestReference launches a container through every engine with the reference
// plugins, or Docker's own network: it proves the lab, so that what fails with
// our plugins in their place is theirs.
func TestReference(t *testing.T) {
	ctx, l := newLab(t)
	h := addHost(t, ctx, l, "h1")
	var programs []string
	for _, p := range []string{"bridge", "host-local", "loopback", "portmap"} {
		programs = append(programs, filepath.Join(l.tools, "plugins", p))
	}
	if err := h.Install("/opt/cni/bin", programs...); err != nil {
		t.Fatal(err)
	}
	if err := h.Write("/etc/cni/net.d/87-reference.conflist", referenceList); err != nil {
		t.Fatal(err)
	}
	forward(t, ctx, h)
	one, two := Containerd1(h), Containerd2(h)
	for _, tt := range []struct {
		name    string
		engine  Engine
		network string
		ports   []string
	}{
		{"docker", Docker20(h), "bridge", []string{"8081:80"}},
		{"ctr1", &Ctr{Containerd: one}, "", nil},
		{"cri1", &CRI{Containerd: one}, "", []string{"8082:80"}},
		{"ctr2", &Ctr{Containerd: two}, "", nil},
		{"cri2", &CRI{Containerd: two}, "", []string{"8083:80"}},
		{"podman", &Podman{Host: h}, "reference", []string{"8084:80"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tryAlone(t, ctx, h, tt.engine, Spec{Name: "c-" + tt.name, Network: tt.network, Ports: tt.ports})
		})
	}
}

// TestReferenceMoby is TestReference for the next Docker, where that was built.
func TestReferenceMoby(t *testing.T) {
	ctx, l := newLab(t)
	for _, firewall := range []string{"iptables", "nftables"} {
		h := addHost(t, ctx, l, firewall)
		d, err := Moby(h, firewall)
		if err != nil {
			t.Log(err) // optional: the table says so
			return
		}
		t.Run(firewall, func(t *testing.T) {
			forward(t, ctx, h)
			tryAlone(t, ctx, h, d, Spec{Name: "page", Network: "bridge", Ports: []string{"8081:80"}})
		})
	}
}

// forward turns forwarding on before Docker does: then it does not set the policy
// of FORWARD to DROP, and with nftables it does not even start otherwise.
func forward(t *testing.T, ctx context.Context, h *Host) {
	t.Helper()
	if _, err := h.Exec(ctx, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"); err != nil {
		t.Fatal(err)
	}
}

// tryAlone launches one container and reaches it from its host and through its
// host port.
func tryAlone(t *testing.T, ctx context.Context, h *Host, e Engine, s Spec) {
	if err := e.Start(ctx); err != nil {
		t.Fatal(err)
	}
	version, err := e.Version(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c, err := e.Run(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s %s: %v in %s", e.Name(), version, c.IPs, c.Netns)
	if len(c.IPs) == 0 {
		t.Error("no address reported")
	}
	for _, ip := range c.IPs {
		fetch(t, ctx, h, netip.AddrPortFrom(ip, 80), s.Name)
	}
	for range s.Ports {
		fetch(t, ctx, h.lan, netip.AddrPortFrom(h.IP, hostPort(t, s.Ports[0])), s.Name)
	}
	if err := c.Ping(ctx, h.lan.IP); err != nil {
		t.Error(err)
	}
	if err := c.Remove(ctx); err != nil {
		t.Error(err)
	}
}

func hostPort(t *testing.T, mapping string) uint16 {
	t.Helper()
	host, _, _ := strings.Cut(mapping, ":")
	n, err := strconv.ParseUint(host, 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	return uint16(n)
}

// fetch expects a page from a host, a moment later.
func fetch(t *testing.T, ctx context.Context, from *Host, at netip.AddrPort, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err := Wait(ctx, func() error {
		page, err := from.Exec(ctx, "timeout", "5", "busybox", "wget", "-q", "-O-", "http://"+at.String()+"/")
		if err == nil && page != want {
			err = fmt.Errorf("page %q, want %q", page, want)
		}
		return err
	})
	if err != nil {
		t.Errorf("%s fetches from %s: %v", from.Name, at, err)
	}
}
