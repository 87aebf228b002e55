package datapath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"github.com/coreos/go-iptables/iptables"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// discardPort is where nobody listens.
const discardPort = 9

// lockSeconds is how long we wait for another program that holds the xtables
// lock.
const lockSeconds = 10

// chain is one chain of ours with its rules, written as iptables -S prints them.
type chain struct {
	table, hook, name string
	first             bool // the jump comes before every other rule of the hook
	rules             []string
}

// chains is the whole firewall of one family; nil where the family has no
// overlay.
func chains(c Config, ip6 bool) []chain {
	of := func(in []netip.Prefix) (out []netip.Prefix) {
		for _, p := range in {
			if p.Addr().Is6() == ip6 {
				out = append(out, p.Masked())
			}
		}
		return out
	}
	var all []netip.Prefix
	var isolated [][]netip.Prefix
	for _, o := range c.Overlays {
		all = append(all, of(o.Subnets)...)
		if o.Isolation {
			isolated = append(isolated, of(o.Subnets))
		}
	}
	if len(all) == 0 {
		return nil
	}

	// A container that sent to the VXLAN port of a host, at any of its addresses,
	// could put anything into any overlay. In PREROUTING three rules do for all
	// bridges and all destinations, on this host and beyond. The table nat, in
	// which nothing can be dropped but sent to the discard port of this host, is
	// asked about the first packet of a flow only; looking at every packet costs
	// 4 % of the throughput between hosts.
	var guard []string
	for _, dev := range []string{conf.Mesos.Bridge("+"), conf.Docker.Bridge("+"), conf.VTEPName} {
		guard = append(guard, fmt.Sprintf("-i %s -p udp -m udp --dport %d -j REDIRECT --to-ports %d", dev, conf.VXLANPort, discardPort))
	}

	// Isolation comes before everything that accepts. Then, because it is most
	// and cheapest to tell: what other hosts send, and what our containers send.
	// Last what belongs to a connection that is already there, or that a port
	// mapping of this host redirected (DNAT), from wherever. Any other new
	// connection from outside into an overlay is left to the rules of the host.
	var forward []string
	for _, own := range isolated {
		for _, s := range own {
			for _, other := range all {
				if slices.Contains(own, other) {
					continue
				}
				for _, pair := range [][2]netip.Prefix{{s, other}, {other, s}} {
					r := fmt.Sprintf("-s %s -d %s -j DROP", pair[0], pair[1])
					if !slices.Contains(forward, r) {
						forward = append(forward, r)
					}
				}
			}
		}
	}
	for _, s := range all {
		forward = append(forward, fmt.Sprintf("-d %s -i %s -j ACCEPT", s, conf.VTEPName))
	}
	for _, b := range c.Bridges {
		for _, half := range of(b.Addrs) {
			forward = append(forward,
				fmt.Sprintf("-s %s -i %s -j ACCEPT", half, b.Name),
				// Bridged frames come here too where Docker asks for it, also
				// those of neighbour discovery, which have other sources.
				fmt.Sprintf("-i %s -o %s -j ACCEPT", b.Name, b.Name))
		}
	}
	for _, s := range all {
		forward = append(forward, fmt.Sprintf("-d %s -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT", s))
	}

	// Packets from one overlay address to another, or to a VTEP, keep their
	// source. So does what never leaves a link.
	pool, local := c.VTEP.IP, []string{"224.0.0.0/4"}
	if ip6 {
		pool, local = c.VTEP.IP6, []string{"fe80::/10", "ff00::/8"}
	}
	var masq []string
	stay := all
	if pool.IsValid() {
		stay = append(slices.Clone(all), pool.Masked())
	}
	for _, s := range stay {
		masq = append(masq, fmt.Sprintf("-d %s -j RETURN", s))
	}
	for _, s := range local {
		masq = append(masq, fmt.Sprintf("-d %s -j RETURN", s))
	}
	for _, s := range all {
		masq = append(masq, fmt.Sprintf("-s %s -j MASQUERADE", s))
	}
	return []chain{
		{"nat", "PREROUTING", mark.VXLANChain, true, guard},
		{"filter", "FORWARD", mark.ForwardChain, true, forward},
		{"nat", "POSTROUTING", mark.MasqueradeChain, false, masq},
	}
}

// unwanted are our chains without a reason to be there.
var unwanted = []chain{
	{table: "nat", hook: "PREROUTING", name: mark.VXLANChain},
	{table: "filter", hook: "FORWARD", name: mark.ForwardChain},
	{table: "nat", hook: "POSTROUTING", name: mark.MasqueradeChain},
}

// firewall is iptables or ip6tables.
type firewall struct {
	family  iptables.Protocol
	ipt     *iptables.IPTables // nil until it was found
	checked bool               // left-overs of an earlier run were looked for
}

func (f *firewall) command() string {
	if f.family == iptables.ProtocolIPv6 {
		return "ip6tables"
	}
	return "iptables"
}

// sync makes our chains what they should be and answers with the number of
// tables that were changed. It waits for the xtables lock for a limited time.
func (f *firewall) sync(ctx context.Context, want []chain) (changed int, err error) {
	remove := want == nil
	if remove {
		if f.checked {
			return 0, nil
		}
		want = unwanted
	}
	if f.ipt == nil {
		f.ipt, err = iptables.New(iptables.IPFamily(f.family), iptables.Timeout(lockSeconds))
		if errors.Is(err, exec.ErrNotFound) {
			if remove {
				return 0, nil
			}
			return 0, fmt.Errorf("%s is not installed, so containers reach nothing outside and a FORWARD policy of DROP stops them: install the package iptables", f.command())
		}
		if err != nil {
			return 0, fmt.Errorf("find out the version of %s: %w", f.command(), err)
		}
	}
	var errs []error
	for _, c := range want {
		script, err := f.difference(c, remove)
		if err == nil && script != "" {
			if err = f.restore(ctx, script); err == nil {
				changed++
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s chain %s: %w", f.command(), c.name, err))
		}
	}
	f.checked = remove && errs == nil
	return changed, errors.Join(errs...)
}

// difference is what iptables-restore has to do; empty: nothing. It replaces
// the content of a chain in one transaction of the kernel, so there is no
// moment with half of the rules.
func (f *firewall) difference(c chain, remove bool) (string, error) {
	rules, err := f.ipt.List(c.table, c.hook)
	if err != nil {
		return "", err
	}
	rules = slices.DeleteFunc(rules, func(r string) bool { return !strings.HasPrefix(r, "-A ") })
	have, err := f.ipt.List(c.table, c.name)
	var missing *iptables.Error
	exists := err == nil
	if errors.As(err, &missing) && (missing.IsNotExist() || missing.ExitStatus() == 1) {
		err = nil
	}
	if err != nil {
		return "", err
	}
	// Some versions add a comment about the tables of the other flavour.
	have = slices.DeleteFunc(have, func(r string) bool { return strings.HasPrefix(r, "#") })

	jump := fmt.Sprintf("-A %s -j %s", c.hook, c.name)
	jumps := 0
	for _, r := range rules {
		if r == jump {
			jumps++
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n", c.table)
	removeJumps := func() {
		for range jumps {
			fmt.Fprintf(&b, "-D %s -j %s\n", c.hook, c.name)
		}
	}
	switch {
	case remove && jumps == 0 && !exists:
		return "", nil
	case remove:
		removeJumps()
		if exists {
			fmt.Fprintf(&b, "-F %s\n-X %s\n", c.name, c.name)
		}
	default:
		want := []string{"-N " + c.name}
		for _, r := range c.rules {
			want = append(want, fmt.Sprintf("-A %s %s", c.name, r))
		}
		inPlace := jumps == 1 && (!c.first || rules[0] == jump)
		same := slices.Equal(have, want)
		if inPlace && same {
			return "", nil
		}
		if !same {
			fmt.Fprintf(&b, ":%s - [0:0]\n%s\n", c.name, strings.Join(want[1:], "\n"))
		}
		if !inPlace {
			removeJumps()
			fmt.Fprintf(&b, "-I %s 1 -j %s\n", c.hook, c.name)
		}
	}
	b.WriteString("COMMIT\n")
	return b.String(), nil
}

func (f *firewall) restore(ctx context.Context, script string) error {
	name := f.command() + "-restore"
	cmd := exec.CommandContext(ctx, name, "--noflush", "--wait", fmt.Sprint(lockSeconds))
	cmd.Stdin = strings.NewReader(script)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}
