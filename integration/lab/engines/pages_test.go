//go:build engines

package engines

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"overlayd.internal/overlay/integration/lab"
)

const top = "../../.."

// TestPages runs the commands that the pages of the runtimes show, on two hosts. What
// stands in for the world: an image called busybox is there, for the hosts reach no
// registry; and what engines make of cgroups is the host's, to be told apart.
func TestPages(t *testing.T) {
	ctx, c := newCluster(t)
	p := &pages{t: t, ctx: ctx, c: c, blocks: map[string][]lab.Block{}}
	all, err := lab.Blocks(top)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range all {
		if strings.HasPrefix(b.Mark, "engines ") {
			p.blocks[b.Page] = append(p.blocks[b.Page], b)
		}
	}
	for _, h := range c.Hosts {
		if err := p.prepare(h); err != nil {
			t.Fatal(err)
		}
	}
	one := c.Hosts[0]
	p.follow("docs/runtimes/nomad.md")
	p.follow("docs/runtimes/mesos.md")

	d := Containerd1(one)
	if err := d.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := one.Exec(ctx, d.ctr("image", "tag", Image, "docker.io/library/busybox:latest")...); err != nil {
		t.Fatal(err)
	}
	p.follow("docs/runtimes/containerd.md")

	podman := &Podman{one}
	if err := podman.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := one.Exec(ctx, "podman", "tag", Image, "docker.io/library/busybox:latest"); err != nil {
		t.Fatal(err)
	}
	p.follow("docs/runtimes/podman.md")

	for _, h := range c.Hosts {
		docker := Docker20(h)
		docker.Networks = []string{IPv4}
		if err := docker.Start(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Exec(ctx, "docker", "tag", Image, "busybox:latest"); err != nil {
			t.Fatal(err)
		}
	}
	p.docker()
	for page := range p.blocks {
		t.Errorf("%s has commands for engines, and is not followed", page)
	}
}

// pages follows pages.
type pages struct {
	t      *testing.T
	ctx    context.Context
	c      *Cluster
	blocks map[string][]lab.Block
}

// tree is where the pages are on a host.
const tree = "/opt/tree"

// prepare puts the programs where the pages have them, and Podman behind a program that
// names the cgroup.
func (p *pages) prepare(h *Host) error {
	h.Path = []string{"/opt/names", p.c.bin}
	// What apt knows of newer packages it would want to fetch.
	if _, err := h.Exec(p.ctx, "sh", "-ec", "rm -rf /var/lib/apt/lists && mkdir -p /opt/names "+tree+" && ln -s '"+p.c.bin+"' "+tree+"/bin"); err != nil {
		return err
	}
	if err := h.Write("/opt/names/podman", `#!/bin/sh
if [ "$1" = run ]; then shift; set -- run --cgroup-parent /`+h.ID+` --cap-add NET_RAW "$@"; fi
exec /usr/bin/podman "$@"
`); err != nil {
		return err
	}
	return os.Chmod(h.File("/opt/names/podman"), 0o755)
}

// run runs a block, with the addresses and the subnets that this cluster has.
func (p *pages) run(b lab.Block, change ...string) string {
	p.t.Helper()
	h := p.c.Hosts[map[string]int{"engines one": 0, "engines two": 1}[b.Mark]]
	script := strings.NewReplacer(change...).Replace(b.Script)
	// ctr keeps its containers, and their cgroups, in a namespace of this name.
	out, err := h.Exec(p.ctx, "env", "CONTAINERD_NAMESPACE="+h.ID, "bash", "-euo", "pipefail", "-c", "cd "+tree+"\n"+script)
	if err != nil {
		p.t.Errorf("%s: %v", b.At(), err)
	}
	return out
}

// follow runs all of a page; where it shows an address, a container has got one.
func (p *pages) follow(page string) {
	p.t.Helper()
	if len(p.blocks[page]) == 0 {
		p.t.Errorf("%s has no commands for engines", page)
	}
	for _, b := range p.blocks[page] {
		if b.Lang == "toml" {
			p.config(b)
			continue
		}
		out := p.run(b)
		if strings.Contains(b.Script, "address show eth0") && !strings.Contains(out, "inet 9.0.") && !strings.Contains(out, "inet 10.64.") {
			p.t.Errorf("%s prints no address of an overlay: %q", b.At(), out)
		}
	}
	delete(p.blocks, page)
}

// config has containerd read what is to stand in its configuration.
func (p *pages) config(b lab.Block) {
	p.t.Helper()
	h := p.c.Hosts[0]
	if err := h.Write("/etc/containerd/page.toml", b.Script); err != nil {
		p.t.Fatal(err)
	}
	out, err := h.Exec(p.ctx, "containerd", "--config", "/etc/containerd/page.toml", "config", "dump")
	if err != nil || !strings.Contains(out, `conf_dir = "/etc/cni/overlay.d"`) || !strings.Contains(out, `bin_dir = "/opt/cni/bin"`) {
		p.t.Errorf("%s: containerd reads %.2000s, %v", b.At(), out, err)
	}
}

var address = regexp.MustCompile(`(?m)^9\.0\.\d+\.\d+`)

// docker runs its page: a container, one on the other host that asks it, and a network
// in place of the agent's.
func (p *pages) docker() {
	p.t.Helper()
	const page = "docs/runtimes/docker.md"
	blocks := p.blocks[page]
	delete(p.blocks, page)
	if len(blocks) != 3 {
		p.t.Fatalf("%s has %d blocks for engines, and this test knows 3", page, len(blocks))
	}
	one := p.c.Hosts[0]
	web := address.FindString(p.run(blocks[0]))
	if web == "" {
		p.t.Fatalf("%s: no address was printed", blocks[0].At())
	}
	if out := p.run(blocks[1], "9.0.1.130", web); !strings.Contains(out, "hello") {
		p.t.Errorf("%s prints %q, and not the page of the other container", blocks[1].At(), out)
	}
	if _, err := one.Exec(p.ctx, "docker", "rm", "-f", "web"); err != nil {
		p.t.Fatal(err)
	}
	half := halves(p.t, one, IPv4, "docker_bridge")[0]
	upper := half.Addr().As4()
	upper[3] += 64
	p.run(blocks[2], "9.0.1.128/25", half.String(), "9.0.1.192/26", netip.PrefixFrom(netip.AddrFrom4(upper), 26).String())
	out, err := one.Exec(p.ctx, "docker", "run", "--rm", "--net", IPv4, "busybox", "ip", "-o", "-4", "address", "show", "eth0")
	if want := fmt.Sprintf("inet %d.%d.%d.", upper[0], upper[1], upper[2]); err != nil || !strings.Contains(out, want) {
		p.t.Errorf("on a network of one's own: %q, %v; want %s", out, err, want)
	}
	if _, err := os.Stat(filepath.Join(one.File("/run/overlay"), "state.json")); err != nil {
		p.t.Error(err)
	}
}
