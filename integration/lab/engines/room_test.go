//go:build engines

package engines

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

// TestDockerRoom: the Docker half is full, and a container that Docker starts gets an
// address of a further block. It talks with others of Docker on the same bridge, and
// with those of another host, whichever block they are in.
func TestDockerRoom(t *testing.T) {
	ctx, c := newCluster(t)
	h := c.Hosts[0]
	d, there := overlayDocker(Docker20(h)), &Podman{c.Hosts[1]}
	for _, e := range []Engine{d, there} {
		if err := e.Start(ctx); err != nil {
			t.Fatal(err)
		}
	}
	first, err := d.Run(ctx, Spec{Name: "first", Network: IPv4})
	if err != nil {
		t.Fatal(err)
	}
	ipam := func(verb string, n int) {
		t.Helper()
		conf := `{"cniVersion":"1.0.0","name":"fill","type":"overlay-ipam","overlay":"` + IPv4 + `","ipam":{"type":"overlay-ipam","half":"docker","overlay":"` + IPv4 + `"}}`
		_, err := h.Exec(ctx, "sh", "-c", fmt.Sprintf(
			`for i in $(seq %d); do echo '%s' | CNI_COMMAND=%s CNI_CONTAINERID=fill-$i CNI_NETNS=/proc/self/ns/net CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin /opt/cni/bin/overlay-ipam >/dev/null || exit 1; done`,
			n, conf, verb))
		if err != nil {
			t.Fatal(err)
		}
	}
	ipam("ADD", 124)
	half := halves(t, h, IPv4, "docker_bridge")[0]
	var all []*Container
	for i := range 3 {
		k, err := d.Run(ctx, Spec{Name: fmt.Sprintf("further-%d", i), Network: IPv4})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, k)
		if len(k.IPs) != 1 || half.Contains(k.IPs[0]) || !netip.MustParsePrefix("9.0.0.0/8").Contains(k.IPs[0]) {
			t.Errorf("%s has %v, want an address of a further block", k.Name, k.IPs)
		}
	}
	far, err := there.Run(ctx, Spec{Name: "far", Network: IPv4})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range all {
		talk(t, ctx, k, far)
		talk(t, ctx, far, k)
		talk(t, ctx, k, first)
		talk(t, ctx, first, k)
	}
	talk(t, ctx, all[0], all[1])
	ipam("DEL", 124)
	for _, k := range append(all, first, far) {
		if err := k.Remove(ctx); err != nil {
			t.Error(err)
		}
	}
}

// TestDockerShared: the halves of an overlay share a pool. Docker's containers, those of
// a CNI runtime and those of Mesos are on one bridge, have addresses of one subnet, none
// of them twice, and talk with each other and with another host.
func TestDockerShared(t *testing.T) {
	ctx, l := newLab(t)
	c, err := l.newCluster(ctx, programs(), 2, strings.Replace(network, "subnet: 9.0.0.0/8, prefix: 24", "subnet: 9.0.0.0/8, prefix: 24, halves: shared", 1))
	if err != nil {
		t.Fatal(err)
	}
	h := c.Hosts[0]
	engines := []Engine{overlayDocker(Docker20(h)), &Podman{h}, NewUCR(h), &Podman{c.Hosts[1]}}
	var all []*Container
	owner := map[netip.Addr]string{}
	for i, e := range engines {
		if err := e.Start(ctx); err != nil {
			t.Fatal(err)
		}
		for j := range 2 {
			k, err := e.Run(ctx, Spec{Name: fmt.Sprintf("k%d-%d", i, j), Network: IPv4})
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, k)
			for _, a := range k.IPs {
				if other := owner[a]; other != "" {
					t.Errorf("%s is given to %s and to %s", a, other, k.Name)
				}
				owner[a] = k.Name
			}
		}
	}
	whole := halves(t, h, IPv4, "docker_bridge")
	if mesos := halves(t, h, IPv4, "mesos_bridge"); mesos[0] != whole[0] || whole[0].Bits() != 24 {
		t.Errorf("Docker has %v and Mesos %v, want one whole subnet", whole, mesos)
	}
	for i := range all {
		talk(t, ctx, all[i], all[(i+2)%len(all)])
		talk(t, ctx, all[(i+2)%len(all)], all[i])
	}
	for _, k := range all {
		if err := k.Remove(ctx); err != nil {
			t.Error(err)
		}
	}
	for _, h := range c.Hosts {
		if left, err := c.Leftovers(ctx, h); err != nil || left != "" {
			t.Errorf("left on %s: %s (%v)", h.Name, left, err)
		}
	}
}
