package fastpath

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// scope is the traffic that the fast path takes, as rules of a firewall see it:
// it comes and goes by devices of ours, from and to addresses of overlays. Without
// VXLAN it comes and goes by those of the underlay, too.
type scope struct {
	overlays []netip.Prefix
	underlay []string
}

// device reports whether a device with that name, in which a last * stands for
// anything, may be one of ours.
func (s scope) device(pattern string) bool {
	prefix, wild := strings.CutSuffix(pattern, "*")
	if slices.ContainsFunc(s.underlay, func(name string) bool { return name == prefix || wild && strings.HasPrefix(name, prefix) }) {
		return true
	}
	if mark.MayBeHostEnd(prefix, wild) { // as a bridge's rules see a container
		return true
	}
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
// to go where the rule sees them. underlay are the devices of peers that are sent to,
// or taken from, without VXLAN.
//
// Rules may have been made by programs that are not on this host: those of containers
// are in containers. What cannot be read counts as a rule.
func ForeignRule(ctx context.Context, overlays []netip.Prefix, underlay ...string) (string, error) {
	s := scope{overlays, underlay}
	var saved []string
	for _, flavour := range []string{"nft", "legacy"} {
		for _, family := range []string{"iptables", "ip6tables"} {
			if flavour == "legacy" && !legacyTables(family) {
				continue // to ask would load the modules
			}
			program := family + "-" + flavour + "-save"
			out, installed, err := output(ctx, programLimit, program)
			if err != nil {
				return "", err
			}
			if !installed && flavour == "legacy" {
				return unreadable("tables of "+family+"-legacy", program), nil
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
	known := func(family, table string) bool {
		return table == mark.NFTable || table == mark.NFGuardTable || slices.Contains(saved, family+" "+table)
	}
	out, installed, err := output(ctx, programLimit, "nft", "-t", "-j", "list", "ruleset")
	if err == nil && !installed {
		return unreadTable(known)
	}
	if err != nil || len(bytes.TrimSpace(out)) == 0 {
		return "", err
	}
	found, err := s.nftables(out, known)
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

// programLimit is how long a program may print rules. Very many take seconds.
const programLimit = 30 * time.Second

// output runs a program that prints rules, if it is installed, and ends it after limit.
func output(ctx context.Context, limit time.Duration, argv ...string) (printed []byte, installed bool, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it did not end within %s", limit))
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second // what it has started may hold its output open
	out, err := cmd.Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, false, nil
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, true, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, true, nil
}

// unreadable says that there are rules which no program of the host shows.
func unreadable(what, program string) string {
	return fmt.Sprintf("the kernel has %s, and %s, which shows them, is not installed", what, program)
}

// families are those of nftables whose chains packets between two containers come by.
var families = map[byte]string{
	unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", unix.NFPROTO_INET: "inet", unix.NFPROTO_BRIDGE: "bridge",
}

// unreadTable names a table of nftables that is neither ours nor known and has
// something at a hook, where there is no program to show it.
func unreadTable(known func(family, table string) bool) (string, error) {
	conn, err := rtnl.OpenFamily(unix.NETLINK_NETFILTER)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	tables, err := rtnl.List(conn, rtnl.Request{
		Step: "list the chains of nftables", Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETCHAIN,
		Header: []byte{unix.NFPROTO_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	}, func(m rtnl.Message) (table string, unread bool) {
		const header = 4 // struct nfgenmsg
		if len(m.Data) < header {
			return "", false
		}
		attrs := map[uint16][]byte{}
		rtnl.EachAttr(m.Data[header:], func(typ uint16, v []byte) { attrs[typ] = v })
		family, ours := families[m.Data[0]]
		table = unix.ByteSliceToString(attrs[unix.NFTA_CHAIN_TABLE])
		return family + " " + table, ours && hasSay(attrs, m.Data[0] == unix.NFPROTO_BRIDGE) && !known(family, table)
	})
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return "", nil // a kernel without nftables
	}
	if err != nil || len(tables) == 0 {
		return "", err
	}
	return unreadable("table "+tables[0]+" of nftables", "nft"), nil
}

// hasSay reports whether a chain of nftables is asked about packets between two
// containers, and has a rule or does not accept; see nftHooks.
func hasSay(chain map[uint16][]byte, bridge bool) bool {
	const prerouting, input, forward, output, postrouting = 0, 1, 2, 3, 4
	number := func(b []byte) uint32 {
		if len(b) != 4 {
			return 0
		}
		return binary.BigEndian.Uint32(b)
	}
	asked := false
	rtnl.EachAttr(chain[unix.NFTA_CHAIN_HOOK], func(typ uint16, v []byte) {
		at := number(v)
		asked = asked || typ == unix.NFTA_HOOK_HOOKNUM && (at == prerouting || at == forward || at == postrouting || bridge && (at == input || at == output))
	})
	const accept = 1
	return asked && (number(chain[unix.NFTA_CHAIN_USE]) > 0 || number(chain[unix.NFTA_CHAIN_POLICY]) != accept)
}
