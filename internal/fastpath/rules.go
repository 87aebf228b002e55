package fastpath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// scope is the traffic that the fast path takes, as rules of a firewall see it:
// it comes and goes by devices of ours, from and to addresses of overlays.
type scope struct{ overlays []netip.Prefix }

// device reports whether a device with that name, in which a last * stands for
// anything, may be one of ours.
func (s scope) device(pattern string) bool {
	prefix, wild := strings.CutSuffix(pattern, "*")
	ours := []string{conf.Mesos.Bridge(""), conf.Docker.Bridge("")} // with more behind
	for _, o := range ours {
		if strings.HasPrefix(prefix, o) || wild && strings.HasPrefix(o, prefix) {
			return true
		}
	}
	return prefix == conf.VTEPName || wild && strings.HasPrefix(conf.VTEPName, prefix)
}

// overlaps reports whether a network has addresses of overlays.
func (s scope) overlaps(p netip.Prefix) bool {
	return slices.ContainsFunc(s.overlays, p.Overlaps)
}

// covered reports whether all addresses of overlays, of the network's family,
// are in it.
func (s scope) covered(p netip.Prefix) bool {
	return !slices.ContainsFunc(s.overlays, func(o netip.Prefix) bool {
		return o.Addr().Is4() == p.Addr().Is4() && (o.Bits() < p.Bits() || !p.Contains(o.Addr()))
	})
}

// ForeignRule looks for a rule of somebody else that could do something to what
// the fast path takes, and describes it; empty: there is none. Such packets have
// to go where the rule sees them.
func ForeignRule(ctx context.Context, overlays []netip.Prefix) (string, error) {
	s := scope{overlays}
	var saved []string
	for _, flavour := range []string{"nft", "legacy"} {
		for _, family := range []string{"iptables", "ip6tables"} {
			if flavour == "legacy" && !legacyTables(family) {
				continue // to ask would load the modules
			}
			out, err := output(ctx, family+"-"+flavour+"-save")
			if err != nil {
				return "", err
			}
			found := s.xtables(out)
			if found != "" {
				return fmt.Sprintf("%s-%s has %q", family, flavour, found), nil
			}
			if flavour == "nft" {
				saved = append(saved, tablesOf(family, out)...)
			}
		}
	}
	// Terse: sets of ours have tens of thousands of elements.
	out, err := output(ctx, "nft", "-t", "-j", "list", "ruleset")
	if err != nil || len(bytes.TrimSpace(out)) == 0 {
		return "", err
	}
	found, err := s.nftables(out, func(family, table string) bool {
		return table == mark.NFTable || table == mark.NFGuardTable || slices.Contains(saved, family+" "+table)
	})
	if err != nil {
		return "", fmt.Errorf("read what nft prints: %w", err)
	}
	if found != "" {
		return "nftables has " + found, nil
	}
	return "", nil
}

// legacyTables reports whether the kernel has tables of iptables-legacy.
func legacyTables(family string) bool {
	file := "/proc/thread-self/net/ip_tables_names"
	if family == "ip6tables" {
		file = "/proc/thread-self/net/ip6_tables_names"
	}
	b, err := os.ReadFile(file)
	return err == nil && len(bytes.TrimSpace(b)) > 0
}

// tablesOf are the tables that iptables-nft saw to, as nft names them.
func tablesOf(family string, saved []byte) (out []string) {
	nft := "ip"
	if family == "ip6tables" {
		nft = "ip6"
	}
	for line := range strings.Lines(string(saved)) {
		if table, ok := strings.CutPrefix(strings.TrimSpace(line), "*"); ok {
			out = append(out, nft+" "+table)
		}
	}
	return out
}

// output runs a program that prints rules; one that is not installed prints
// none.
func output(ctx context.Context, argv ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}
