//go:build engines

package engines

import (
	"fmt"
	"net/netip"
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
