package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// The rows of attach and burst, named as the goals name them.
const (
	ours       = "ours, IPv4"
	oursDual   = "ours, dual stack"
	unchecked  = "ours, IPv4, without source checks"
	baseName   = "other build, IPv4"
	baseDual   = "other build, dual stack"
	floorName  = "floor program (raw netlink, no addresses)"
	reference  = "bridge + host-local"
	referMasq  = "bridge + host-local, ipMasq"
	referDeb   = "bridge + host-local (Debian)"
	oursIPAM   = "overlay-ipam"
	hostLocal  = "host-local"
	baseIPAM   = "overlay-ipam of the other build"
	containers = 50

	baseRounds = 15   // at least, beside another build
	callRounds = 300  // the same of calls that take 2 ms, which scatter by a tenth
	baseLimit  = 1.03 // what ours may take, of what another build takes
)

// attachBox is a host with a real agent, and every way to attach to it.
func (c *config) attachBox(ctx context.Context) (*box, map[string]variant, error) {
	host, err := c.startHost(ctx, clusterYAML)
	if err != nil {
		return nil, nil, err
	}
	b, err := makeBox(ctx, c.lab, host.Netns, "c", containers)
	if err != nil {
		return nil, nil, err
	}
	hostLocalDir := filepath.Join(c.lab.Dir, "host-local")
	if err := os.MkdirAll(hostLocalDir, 0o755); err != nil {
		return nil, nil, err
	}
	if err := c.tmpfs(hostLocalDir); err != nil {
		return nil, nil, err
	}
	// The reference's bridge stands before the first ADD, as ours does.
	if err := host.Configure(ctx, "link add cni0 up type bridge", "address add 172.28.0.1/16 dev cni0",
		"link add floor0 up type bridge", "address add 172.29.0.1/16 dev floor0"); err != nil {
		return nil, nil, err
	}
	bin, err := c.install(c.bin, "m-overlay", "tools/floor")
	if err != nil {
		return nil, nil, err
	}
	peers, err := c.install(c.peers, "bridge", "host-local")
	if err != nil {
		return nil, nil, err
	}
	ownIn := func(bin, name, overlay string) variant {
		return b.cniVariant(name, filepath.Join(bin, "m-overlay"), bin, map[string]any{
			"cniVersion": "1.0.0", "name": overlay, "type": "m-overlay", "runDir": host.RunDir,
			"ipam": map[string]any{"type": "overlay-ipam"},
		})
	}
	own := func(name, overlay string) variant { return ownIn(bin, name, overlay) }
	free := b.cniVariant(unchecked, filepath.Join(bin, "m-overlay"), bin, map[string]any{
		"cniVersion": "1.0.0", "name": "v4", "type": "m-overlay", "runDir": host.RunDir, "antispoof": false,
		"ipam": map[string]any{"type": "overlay-ipam"},
	})
	refer := func(name, dir string, masq bool) variant {
		return b.cniVariant(name, filepath.Join(dir, "bridge"), dir, map[string]any{
			"cniVersion": "1.0.0", "name": "ref", "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": masq, "hairpinMode": true,
			"ipam": map[string]any{
				"type": "host-local", "dataDir": hostLocalDir,
				"ranges": []any{[]any{map[string]any{"subnet": "172.28.0.0/16"}}},
				"routes": []any{map[string]any{"dst": "0.0.0.0/0"}},
			},
		})
	}
	floor := filepath.Join(bin, "floor")
	vs := []variant{
		own(ours, "v4"), own(oursDual, "dual"), free,
		refer(reference, peers, false), refer(referMasq, peers, true),
		{floorName,
			func(i int) *exec.Cmd {
				return exec.Command(floor, "add", b.spaces[i].Path, fmt.Sprintf("fl%d", i), "eth0", "floor0", fmt.Sprintf("172.29.1.%d/16", i+2), "172.29.0.1")
			},
			func(i int) *exec.Cmd { return exec.Command(floor, "del", fmt.Sprintf("fl%d", i)) }},
	}
	if c.base != "" {
		base, err := c.install(c.base, "m-overlay")
		if err != nil {
			return nil, nil, err
		}
		vs = append(vs, ownIn(base, baseName, "v4"), ownIn(base, baseDual, "dual"))
	}
	if _, err := os.Stat(filepath.Join(c.debian, "bridge")); err == nil {
		vs = append(vs, refer(referDeb, c.debian, false))
	}
	byName := map[string]variant{}
	for _, v := range vs {
		byName[v.name] = v
	}
	return b, byName, nil
}

func pick(all map[string]variant, names ...string) []variant {
	var out []variant
	for _, n := range names {
		if v, ok := all[n]; ok {
			out = append(out, v)
		}
	}
	return out
}

// attach measures one ADD and one DEL at a time.
func attach(ctx context.Context, c *config) error {
	b, all, err := c.attachBox(ctx)
	if err != nil {
		return err
	}
	if err := b.interleaved(ctx, c.report, c.rounds, pick(all, ours, baseName, oursDual, baseDual, unchecked, reference, referMasq, referDeb, floorName)); err != nil {
		return err
	}
	r := c.report
	r.ratio("ADD", ours, reference, "<=", 0.40)
	r.ratio("ADD", ours, referMasq, "<=", 0.15)
	r.ratio("ADD", ours, floorName, "<=", 1.5)
	r.ratio("ADD", oursDual, ours, "<=", 1.2)
	r.ratio("ADD", ours, unchecked, "<=", 1.1)
	r.ratio("DEL", ours, reference, "<=", 0.95)
	r.ratio("DEL", ours, referMasq, "<=", 0.30)
	if c.base != "" {
		for _, verb := range [...]string{"ADD", "DEL"} {
			r.ratio(verb, ours, baseName, "<=", baseLimit)
			r.ratio(verb, oursDual, baseDual, "<=", baseLimit)
			r.ratio(verb, unchecked, baseName, "<=", baseLimit) // for one that has no source checks
		}
	}
	return nil
}

// burst measures 50 at once.
func burst(ctx context.Context, c *config) error {
	b, all, err := c.attachBox(ctx)
	if err != nil {
		return err
	}
	rounds := max(3, c.rounds/3)
	if c.base != "" {
		rounds = max(rounds, baseRounds)
	}
	if err := b.burst(ctx, c.report, "attach", containers, rounds, pick(all, ours, baseName, reference, referMasq)); err != nil {
		return err
	}
	r := c.report
	r.ratio("50 attach ADD at once", ours, reference, "<=", 0.35)
	r.ratio("50 attach ADD at once", ours, referMasq, "<=", 0.13)
	r.ratio("50 attach DEL at once", ours, reference, "<=", 0.60)
	r.ratio("50 attach DEL at once", ours, referMasq, "<=", 0.10)
	if c.base != "" {
		r.ratio("50 attach ADD at once", ours, baseName, "<=", baseLimit)
		r.ratio("50 attach DEL at once", ours, baseName, "<=", baseLimit)
	}
	return nil
}

// ipam measures the address stores alone, empty and with 60,000 in use.
func ipam(ctx context.Context, c *config) error {
	// Agent subnets of /15, so that a half holds 65,533.
	host, err := c.startHost(ctx, `
vtep_subnet: 44.0.0.0/20
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: empty, subnet: 9.0.0.0/8, prefix: 15}
  - {name: full, subnet: 10.0.0.0/8, prefix: 15}
`)
	if err != nil {
		return err
	}
	b, err := makeBox(ctx, c.lab, host.Netns, "c", containers)
	if err != nil {
		return err
	}
	own := func(overlay string) map[string]any {
		return map[string]any{
			"cniVersion": "1.0.0", "name": overlay, "type": "bridge", "runDir": host.RunDir,
			"ipam": map[string]any{"type": "overlay-ipam", "half": "docker"},
		}
	}
	refer := func(name, dir string) map[string]any {
		return map[string]any{
			"cniVersion": "1.0.0", "name": name, "type": "bridge",
			"ipam": map[string]any{"type": "host-local", "dataDir": dir,
				"ranges": []any{[]any{map[string]any{"subnet": "9.64.0.0/16"}}}},
		}
	}
	tmpfs := filepath.Join(c.lab.Dir, "tmpfs") // where the reference does not pay for a disk
	if err := os.MkdirAll(tmpfs, 0o755); err != nil {
		return err
	}
	if err := c.tmpfs(tmpfs); err != nil {
		return err
	}
	bin, err := c.install(c.bin, "overlay-ipam")
	if err != nil {
		return err
	}
	peers, err := c.install(c.peers, "host-local")
	if err != nil {
		return err
	}
	ipamBin, hlBin := filepath.Join(bin, "overlay-ipam"), filepath.Join(peers, "host-local")
	const at60k = ", 60,000 in use"
	vs := []variant{
		b.cniVariant(oursIPAM, ipamBin, bin, own("empty")),
		b.cniVariant(oursIPAM+at60k, ipamBin, bin, own("full")),
		b.cniVariant(hostLocal, hlBin, peers, refer("ref", filepath.Join(tmpfs, "empty"))),
	}
	bursts := []variant{vs[0], vs[2]}
	if c.base != "" {
		base, err := c.install(c.base, "overlay-ipam")
		if err != nil {
			return err
		}
		other := b.cniVariant(baseIPAM, filepath.Join(base, "overlay-ipam"), base, own("empty"))
		vs = append(vs, other, b.cniVariant(baseIPAM+at60k, filepath.Join(base, "overlay-ipam"), base, own("full")))
		bursts = append(bursts, other)
	}
	if err := b.fill(ctx, ipamBin, own("full"), 60000); err != nil {
		return fmt.Errorf("fill overlay-ipam: %w", err)
	}
	if err := fillHostLocal(filepath.Join(tmpfs, "full", "full"), 60000); err != nil {
		return err
	}
	slow := b.cniVariant(hostLocal+at60k, hlBin, peers, refer("full", filepath.Join(tmpfs, "full")))

	rep := &Report{}
	rounds := c.rounds
	if c.base != "" {
		rounds = max(rounds, callRounds)
	}
	if err := b.interleaved(ctx, rep, rounds, vs); err != nil {
		return err
	}
	if err := b.interleaved(ctx, rep, max(3, c.rounds/10), []variant{slow}); err != nil {
		return err
	}
	for _, row := range rep.Rows {
		row.Part = "addresses " + row.Part
		c.report.Rows = append(c.report.Rows, row)
	}
	if err := b.burst(ctx, c.report, "addresses", containers, c.rounds, bursts); err != nil {
		return err
	}
	r := c.report
	r.ratio("addresses ADD", oursIPAM+at60k, oursIPAM, "<=", 1.3)
	r.ratio("addresses ADD", oursIPAM+at60k, hostLocal+at60k, "<=", 0.01)
	r.ratio("50 addresses ADD at once", oursIPAM, hostLocal, "<=", 0.6)
	if c.base != "" {
		for _, part := range [...]string{"addresses ADD", "addresses DEL"} {
			r.ratio(part, oursIPAM, baseIPAM, "<=", baseLimit)
			r.ratio(part, oursIPAM+at60k, baseIPAM+at60k, "<=", baseLimit)
		}
		r.ratio("50 addresses ADD at once", oursIPAM, baseIPAM, "<=", baseLimit)
		r.ratio("50 addresses DEL at once", oursIPAM, baseIPAM, "<=", baseLimit)
	}
	return nil
}
