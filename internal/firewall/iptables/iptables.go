// Package iptables makes a firewall.Ruleset with iptables and ip6tables, of
// either flavour (nft, legacy), and with ipset for what grows. Rules are read by
// iptables-save and written by iptables-restore, which replaces the content of a
// chain in one transaction of the kernel; sets are read and written by netlink.
package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"github.com/coreos/go-iptables/iptables"
	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/mark"
)

// lockSeconds is how long we wait for another program that holds the xtables
// lock.
const lockSeconds = 10

// Firewall is the implementation.
type Firewall struct {
	sets     sets
	guard    *guard
	families [2]family
	other    [2]otherFlavour
	wanted   *firewall.Ruleset // of the last Set that succeeded
}

// family is iptables or ip6tables.
type family struct {
	ip6     bool
	flavour string // empty: the one that the name leads to
	found   bool   // the program is there and works
	removed bool   // what an earlier run left was looked for
}

// New opens a netlink socket in the network namespace of the calling thread. It
// changes nothing.
func New() (*Firewall, error) {
	s, err := openSets()
	if err != nil {
		return nil, err
	}
	g, err := openGuard()
	if err != nil {
		s.close()
		return nil, err
	}
	return &Firewall{sets: s, guard: g, families: [2]family{{}, {ip6: true}}}, nil
}

// Close closes the sockets.
func (f *Firewall) Close() {
	f.sets.close()
	f.guard.close()
}

// Name is iptables.
func (f *Firewall) Name() string { return "iptables" }

// Usable says why iptables cannot be used here, or nil.
func Usable() error {
	for _, name := range []string{"iptables", "iptables-save", "iptables-restore"} {
		if _, err := exec.LookPath(name); err != nil {
			return fmt.Errorf("%s is not installed: install the package iptables", name)
		}
	}
	if _, _, err := netlink.IpsetProtocol(); err != nil {
		return fmt.Errorf("the kernel has no ip_set, which the rules of iptables need: %w", err)
	}
	return nil
}

// Set is described with firewall.Firewall. Sets are filled before the rules that
// ask them are made, and emptied of what is left afterwards, so that nothing is
// refused on the way that is accepted before and after.
func (f *Firewall) Set(ctx context.Context, r firewall.Ruleset) (changed int, err error) {
	if len(r.Chains) == 0 {
		return f.Remove(ctx)
	}
	f.wanted = nil
	changed, left, err := f.sets.fill(r)
	if err != nil {
		return changed, err
	}
	var errs []error
	for i := range f.families {
		fam := &f.families[i]
		want := r.IPv4
		if fam.ip6 {
			want = r.IPv6
		}
		var n int
		if want {
			fam.removed = false
			n, err = fam.set(ctx, r)
		} else {
			n, err = fam.remove(ctx)
		}
		changed += n
		if err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return changed, errors.Join(errs...)
	}
	n, err := f.removeOther(ctx)
	changed += n
	if err != nil {
		return changed, err
	}
	if err := f.sets.drop(left); err != nil {
		return changed, err
	}
	if err := f.guard.keep(); err != nil {
		return changed, err
	}
	f.wanted = &r
	return changed, nil
}

// Elements is described with firewall.Firewall.
func (f *Firewall) Elements(_ context.Context, name string, add, remove []firewall.Element) error {
	if f.wanted == nil {
		return errors.New("iptables: no ruleset was set yet")
	}
	s, err := f.wanted.Set(name)
	if err != nil {
		return fmt.Errorf("iptables: %w", err)
	}
	if err := f.sets.change(*s, add, remove); err != nil {
		f.wanted = nil
		return err
	}
	s.Change(add, remove)
	delete(f.guard.elements, setName(name, false))
	delete(f.guard.elements, setName(name, true))
	return nil
}

// Altered is described with firewall.Firewall. Rules of the nft flavour are
// announced; the legacy flavour and ipset announce nothing.
func (f *Firewall) Altered() (bool, error) {
	if f.wanted == nil {
		return false, nil
	}
	if altered, err := f.guard.altered(); altered || err != nil {
		return altered, err
	}
	return f.guard.emptied(f.wanted)
}

// Remove is described with firewall.Firewall.
func (f *Firewall) Remove(ctx context.Context) (changed int, err error) {
	f.wanted = nil
	var errs []error
	for i := range f.families {
		n, err := f.families[i].remove(ctx)
		changed += n
		if err != nil {
			errs = append(errs, err)
		}
	}
	n, err := f.removeOther(ctx)
	changed += n
	if err := errors.Join(append(errs, err)...); err != nil {
		return changed, err
	}
	n, err = f.sets.destroy(nil)
	return changed + n, err
}

func (f *family) command() string {
	if f.ip6 {
		return "ip6tables" + f.flavour
	}
	return "iptables" + f.flavour
}

// find looks for the program once.
func (f *family) find() error {
	if f.found {
		return nil
	}
	protocol := iptables.ProtocolIPv4
	if f.ip6 {
		protocol = iptables.ProtocolIPv6
	}
	_, err := iptables.New(iptables.IPFamily(protocol), iptables.Timeout(lockSeconds))
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("%s is not installed, so containers reach nothing outside and a FORWARD policy of DROP stops them: install the package iptables (%w)", f.command(), err)
	case err != nil:
		return fmt.Errorf("find out the version of %s: %w", f.command(), err)
	}
	f.found = true
	return nil
}

// set makes our chains what they should be and returns how many were changed.
func (f *family) set(ctx context.Context, r firewall.Ruleset) (changed int, err error) {
	if err := f.find(); err != nil {
		return 0, err
	}
	have, err := f.read(ctx)
	if err != nil {
		return 0, err
	}
	script, changed := f.difference(have, r)
	if script == "" {
		return 0, nil
	}
	return changed, f.restore(ctx, script)
}

// remove takes our chains away. The administrator's stays if it has rules.
func (f *family) remove(ctx context.Context) (changed int, err error) {
	if f.removed {
		return 0, nil
	}
	if err := f.find(); errors.Is(err, exec.ErrNotFound) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	return f.clear(ctx)
}

// clear is remove with a program that is there.
func (f *family) clear(ctx context.Context) (changed int, err error) {
	have, err := f.read(ctx)
	if err != nil {
		return 0, err
	}
	script, changed := removal(have)
	if script != "" {
		err = f.restore(ctx, script)
	}
	f.removed = err == nil
	return changed, err
}

// tables are the rules of every chain, by table and chain, as iptables-save
// prints them without the name of the chain.
type tables map[string]map[string][]string

func (f *family) read(ctx context.Context) (tables, error) {
	name := f.command() + "-save"
	cmd := exec.CommandContext(ctx, name)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	have := tables{}
	var table map[string][]string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			table = map[string][]string{}
			have[line[1:]] = table
		case strings.HasPrefix(line, ":"):
			chain, _, _ := strings.Cut(line[1:], " ")
			table[chain] = []string{}
		case strings.HasPrefix(line, "-A "):
			chain, rule, _ := strings.Cut(line[3:], " ")
			table[chain] = append(table[chain], rule)
		}
	}
	return have, nil
}

func (f *family) restore(ctx context.Context, script string) error {
	name := f.command() + "-restore"
	cmd := exec.CommandContext(ctx, name, "--noflush", "--wait", fmt.Sprint(lockSeconds))
	cmd.Stdin = strings.NewReader(script)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	return nil
}

// hooks says where a chain is hooked in. First: its jump comes before every
// other rule of the hook.
var hooks = map[firewall.Hook]struct {
	table, hook string
	first       bool
}{
	firewall.Raw:         {"raw", "PREROUTING", true},
	firewall.Input:       {"filter", "INPUT", true},
	firewall.Forward:     {"filter", "FORWARD", true},
	firewall.Output:      {"filter", "OUTPUT", true},
	firewall.Postrouting: {"nat", "POSTROUTING", false},
}

// ours are the chains that we remove where they are not wanted, with the hook
// whose jump goes first.
var ours = []struct{ table, hook, name string }{
	{"raw", "PREROUTING", mark.RawChain},
	{"filter", "INPUT", mark.InputChain},
	{"filter", "OUTPUT", mark.OutputChain},
	{"filter", "FORWARD", mark.ForwardChain},
	{"filter", "", mark.HostInChain},
	{"filter", "", mark.HostOutChain},
	{"filter", "", mark.FromChain},
	{"filter", "", mark.ToChain},
	{"filter", "", mark.ReachChain},
	{"filter", "", mark.EncapChain},
	{"nat", "POSTROUTING", mark.MasqueradeChain},
	{"nat", "PREROUTING", mark.OldVXLANChain},
}
