//go:build engines

package engines

import (
	"net/netip"
	"path/filepath"
	"testing"
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
	// Docker sets the policy of FORWARD to DROP when it is the one who turns
	// forwarding on.
	if _, err := h.Exec(ctx, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"); err != nil {
		t.Fatal(err)
	}
	one, two := Containerd1(h), Containerd2(h)
	for _, tt := range []struct {
		name    string
		engine  Engine
		network string
		ports   []string
	}{
		{"docker", &Docker{Host: h}, "bridge", []string{"8081:80"}},
		{"ctr1", &Ctr{Containerd: one}, "", nil},
		{"cri1", &CRI{Containerd: one}, "", []string{"8082:80"}},
		{"ctr2", &Ctr{Containerd: two}, "", nil},
		{"cri2", &CRI{Containerd: two}, "", []string{"8083:80"}},
		{"podman", &Podman{Host: h}, "reference", []string{"8084:80"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.engine.Start(ctx); err != nil {
				t.Fatal(err)
			}
			version, err := tt.engine.Version(ctx)
			if err != nil {
				t.Fatal(err)
			}
			c, err := tt.engine.Run(ctx, Spec{Name: "c-" + tt.name, Network: tt.network, Ports: tt.ports})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s %s: %v in %s", tt.engine.Name(), version, c.IPs, c.Netns)
			if len(c.IPs) == 0 {
				t.Error("no address reported")
			}
			for _, ip := range c.IPs {
				err := Wait(ctx, func() error {
					_, err := h.Exec(ctx, "timeout", "5", "busybox", "wget", "-q", "-O-", "http://"+netip.AddrPortFrom(ip, 80).String())
					return err
				})
				if err != nil {
					t.Error(err)
				}
			}
			for _, p := range tt.ports {
				at := netip.AddrPortFrom(h.IP, 80).Addr().String() + ":" + p[:4]
				if _, err := l.LAN.Exec(ctx, "timeout", "5", "busybox", "wget", "-q", "-O-", "http://"+at); err != nil {
					t.Error(err)
				}
			}
			if err := c.Ping(ctx, l.LAN.IP); err != nil {
				t.Error(err)
			}
			if err := c.Remove(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}
