//go:build engines

package engines

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestDockerOptions asks Docker for an address that is free, and for two that
// are not: one is Docker's, the other Podman's.
func TestDockerOptions(t *testing.T) {
	ctx, c := newCluster(t)
	h := c.Hosts[0]
	d, p := overlayDocker(Docker20(h)), &Podman{h}
	for _, e := range []Engine{d, p} {
		if err := e.Start(ctx); err != nil {
			t.Fatal(err)
		}
	}
	subnet := halves(t, h, IPv4, "docker_bridge")[0]
	var all []*Container
	for i, e := range []Engine{d, p} {
		wanted := nthOf(subnet, 77+i)
		k, err := e.Run(ctx, Spec{Name: "has-it", Network: IPv4, Args: []string{"--ip", wanted.String()}})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(k.IPs, []netip.Addr{wanted}) {
			t.Errorf("%s --ip %s: got %s", e.Name(), wanted, k.IPs)
		}
		all = append(all, k)
		_, err = d.Run(ctx, Spec{Name: "taken", Network: IPv4, Args: []string{"--ip", wanted.String()}})
		if err == nil || !strings.Contains(err.Error(), "address "+wanted.String()+" is in use by ") {
			t.Errorf("docker run with the address %s of a container of %s: %v", wanted, e.Name(), err)
		}
		if _, err := h.Exec(ctx, "docker", "rm", "-f", "taken"); err != nil {
			t.Error(err)
		}
	}
	talk(t, ctx, all[0], all[1])

	// Both families by name.
	ranges := halves(t, h, Both, "docker_bridge")
	wanted := []netip.Addr{nthOf(ranges[0], 99), nthOf(ranges[1], 99)}
	k, err := d.Run(ctx, Spec{Name: "both", Network: Both, Args: []string{"--ip", wanted[0].String(), "--ip6", wanted[1].String()}})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(k.IPs, wanted) {
		t.Errorf("--ip and --ip6 %s: got %s", wanted, k.IPs)
	}
	checkAddrs(t, ctx, h, k, Both, "docker_bridge")
	for _, k := range append(all, k) {
		if err := k.Remove(ctx); err != nil {
			t.Error(err)
		}
	}
	replaceNetwork(t, ctx, h, d, subnet)
	nothingLeft(t, ctx, c, h)
}

// replaceNetwork puts a network for the last quarter of an overlay's half in the
// place of the agent's, as the guide to Docker says.
func replaceNetwork(t *testing.T, ctx context.Context, h *Host, d *Docker, subnet netip.Prefix) {
	t.Helper()
	part := netip.PrefixFrom(nthOf(subnet, 96), subnet.Bits()+2)
	if _, err := h.Exec(ctx, "docker", "network", "rm", IPv4); err != nil {
		t.Fatal(err)
	}
	_, err := h.Exec(ctx, "docker", "network", "create", "--ipam-driver", "overlay", "--ipam-opt", "overlay="+IPv4,
		"--subnet", subnet.String(), "--ip-range", part.String(),
		"-o", "com.docker.network.bridge.name=d-"+IPv4, "-o", "com.docker.network.bridge.inhibit_ipv4=true",
		"-o", "com.docker.network.bridge.gateway_mode_ipv4=nat-unprotected",
		"-o", "com.docker.network.bridge.enable_ip_masquerade=false", "-o", "com.docker.network.driver.mtu=1450", IPv4)
	if err != nil {
		t.Fatal(err)
	}
	before := networkID(t, ctx, h, IPv4)
	k, err := d.Run(ctx, Spec{Name: "in-range", Network: IPv4})
	if err != nil {
		t.Fatal(err)
	}
	if len(k.IPs) != 1 || !part.Contains(k.IPs[0]) {
		t.Errorf("--ip-range %s: got %s", part, k.IPs)
	}
	// Longer than the agent waits for somebody's network.
	later, cancel := context.WithTimeout(ctx, 6*time.Second)
	defer cancel()
	<-later.Done()
	if _, err := h.Exec(ctx, "busybox", "wget", "-q", "-O-", "http://127.0.0.1:6441/readyz"); err != nil {
		t.Errorf("the agent does not agree with the network: %v", err)
	}
	if err := k.Remove(ctx); err != nil {
		t.Error(err)
	}
	if now := networkID(t, ctx, h, IPv4); now != before {
		t.Errorf("the network is another one: %s, before %s", now, before)
	}
}

// TestDockerLives ends and starts dockerd and the agent under a running
// container of Docker, with which one on another host goes on talking.
func TestDockerLives(t *testing.T) {
	ctx, c := newCluster(t)
	h := c.Hosts[0]
	d := overlayDocker(Docker20(h))
	d.args = []string{"--live-restore"}
	there := &Podman{c.Hosts[1]}
	for _, e := range []Engine{d, there} {
		if err := e.Start(ctx); err != nil {
			t.Fatal(err)
		}
	}
	far, err := there.Run(ctx, Spec{Name: "far", Network: Both})
	if err != nil {
		t.Fatal(err)
	}
	near, err := d.Run(ctx, Spec{Name: "near", Network: Both})
	if err != nil {
		t.Fatal(err)
	}
	network := networkID(t, ctx, h, Both)
	for _, tt := range []struct {
		name  string
		end   func() error
		start func() error
	}{
		{"dockerd stopped", func() error { return d.Daemon.Stop() }, func() error { return d.StartDaemon(ctx) }},
		{"dockerd killed", func() error { return d.Daemon.Kill() }, func() error { return d.StartDaemon(ctx) }},
		{"agent stopped", func() error { return c.Agents[0].Stop() }, func() error { return startAgent(ctx, c, 0) }},
		{"agent killed", func() error { return c.Agents[0].Kill() }, func() error { return startAgent(ctx, c, 0) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.end(); err != nil {
				t.Fatal(err)
			}
			talk(t, ctx, far, near)
			if err := tt.start(); err != nil {
				t.Fatal(err)
			}
			talk(t, ctx, far, near)
			talk(t, ctx, near, far)
			if now := networkID(t, ctx, h, Both); now != network {
				t.Errorf("the network is another one: %s, before %s", now, network)
			}
			another, err := d.Run(ctx, Spec{Name: "another", Network: Both})
			if err != nil {
				t.Fatal(err)
			}
			talk(t, ctx, far, another)
			if err := another.Remove(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	if err := near.Remove(ctx); err != nil {
		t.Error(err)
	}
	nothingLeft(t, ctx, c, h)
}

func startAgent(ctx context.Context, c *Cluster, host int) error {
	if err := c.StartAgent(host); err != nil {
		return err
	}
	return c.AgentReady(ctx, host)
}

func networkID(t *testing.T, ctx context.Context, h *Host, name string) string {
	t.Helper()
	id, err := h.Exec(ctx, "docker", "network", "inspect", "-f", "{{.ID}}", name)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestDockerKilled: a dockerd that is killed gives back no address. After the
// next start its containers have ended, and no address is lost.
func TestDockerKilled(t *testing.T) {
	ctx, c := newCluster(t)
	h := c.Hosts[0]
	d := overlayDocker(Docker20(h))
	if err := d.Start(ctx); err != nil {
		t.Fatal(err)
	}
	var ks []*Container
	for _, name := range []string{"one", "two"} {
		k, err := d.Run(ctx, Spec{Name: name, Network: Both})
		if err != nil {
			t.Fatal(err)
		}
		ks = append(ks, k)
	}
	if err := d.Daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := d.StartDaemon(ctx); err != nil {
		t.Fatal(err)
	}
	for _, k := range ks {
		if err := k.Remove(ctx); err != nil {
			t.Error(err)
		}
	}
	// What dockerd forgets to give back is released after a minute or two.
	patient, cancel := context.WithTimeout(ctx, 150*time.Second)
	defer cancel()
	err := Wait(patient, func() error {
		left, err := c.Attached(patient, h)
		if err == nil && len(left) > 0 {
			err = errLeft(left)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	again, err := d.Run(ctx, Spec{Name: "again", Network: Both, Args: []string{"--ip", ks[0].IPs[0].String()}})
	if err != nil {
		t.Fatalf("the address of a container that is gone: %v", err)
	}
	if err := again.Remove(ctx); err != nil {
		t.Error(err)
	}
	if err := c.Check(ctx, h); err != nil {
		t.Error(err)
	}
}

type errLeft []string

func (e errLeft) Error() string { return "left: " + strings.Join(e, ", ") }

// TestDockerFirst: dockerd is there before the agent; first a new one, then one
// whose networks need the agent, which comes while dockerd looks for it.
func TestDockerFirst(t *testing.T) {
	ctx, c := newCluster(t)
	h := c.Hosts[0]
	if err := c.Agents[0].Stop(); err != nil {
		t.Fatal(err)
	}
	d := Docker20(h)
	if err := d.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := startAgent(ctx, c, 0); err != nil {
		t.Fatal(err)
	}
	if err := h.ready(ctx, c.Agents[0], append([]string{"docker", "network", "inspect"}, allNetworks...)...); err != nil {
		t.Fatal(err)
	}
	k, err := d.Run(ctx, Spec{Name: "first", Network: Both, Args: []string{"--restart=always"}})
	if err != nil {
		t.Fatal(err)
	}
	checkAddrs(t, ctx, h, k, Both, "docker_bridge")

	for _, daemon := range []*Daemon{d.Daemon, c.Agents[0]} {
		if err := daemon.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.launch(); err != nil {
		t.Fatal(err)
	}
	err = Wait(ctx, func() error {
		if tail := d.Daemon.Tail(20); !strings.Contains(tail, "Unable to locate plugin: overlay") {
			return fmt.Errorf("dockerd has not looked for the driver yet: %s", tail)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := startAgent(ctx, c, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.answers(ctx); err != nil {
		t.Fatal(err)
	}
	// It has been started again, with other addresses.
	settings, err := h.inspect(ctx, "docker", k.ID)
	if err == nil {
		k.IPs, err = settings.Networks[Both].ips()
	}
	if err != nil {
		t.Fatal(err)
	}
	checkAddrs(t, ctx, h, k, Both, "docker_bridge")
	if err := k.Remove(ctx); err != nil {
		t.Error(err)
	}
	nothingLeft(t, ctx, c, h)
}
