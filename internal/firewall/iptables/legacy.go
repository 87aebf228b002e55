package iptables

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/firewall"
	"overlayd.internal/overlay/internal/rtnl"
)

// guard tells whether somebody changed what the kernel announces to nobody: the
// tables of the legacy flavour, and sets of ipset. It reads them in the kernel's
// own form, without a program.
type guard struct {
	raw  [2]int // sockets of IPv4 and IPv6, to ask for tables; -1: none
	conn *rtnl.Conn
	made map[table][sha256.Size]byte // what the last Set left; of tables that the kernel has
	// elements is how many our sets should have, by name; those that changed since
	// they were counted are not there.
	elements map[string]int
}

// Legacy reports whether the rules of a family are of the legacy flavour, which is no
// part of nftables. The program that a name leads to tells (xtables-nft-multi or
// xtables-legacy-multi), without being run; one that is called otherwise counts as
// legacy.
func (f *Firewall) Legacy() bool {
	for _, fam := range f.families {
		path, err := exec.LookPath(fam.command())
		if err != nil {
			continue // no rules either
		}
		if path, err = filepath.EvalSymlinks(path); err != nil || !strings.Contains(filepath.Base(path), "nft") {
			return true
		}
	}
	return false
}

// table is one of a family.
type table struct {
	ip6  bool
	name string
}

// The options of sockets by which tables are read, the same for both families,
// and the size of what is asked with; linux/netfilter_ipv4/ip_tables.h.
const (
	getInfo    = 64
	getEntries = 65

	tableName = 32 // bytes of a table's name
	infoSize  = tableName + 4 + 5*4 + 5*4 + 4 + 4
	// Behind the name, and padded to eight bytes.
	entriesHeader = tableName + 8
)

// maxTable is the largest table that is read as a whole; of larger ones only the
// size is looked at.
const maxTable = 1 << 20

// Where an entry has the offset of the next one and what changes by itself: the
// mark of the last check for loops, and counters.
var entryLayout = map[bool]struct{ next, comefrom, end int }{
	false: {84 + 4 + 2, 84 + 4 + 4, 112},
	true:  {136 + 4 + 2, 136 + 4 + 4, 168},
}

func openGuard() (*guard, error) {
	g := &guard{raw: [2]int{-1, -1}}
	for i, family := range []int{unix.AF_INET, unix.AF_INET6} {
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err == nil {
			g.raw[i] = fd
		} // a kernel without the family has no rules of it
	}
	conn, err := rtnl.OpenFamily(unix.NETLINK_NETFILTER)
	if err != nil {
		g.close()
		return nil, err
	}
	g.conn = conn
	return g, nil
}

func (g *guard) close() {
	for _, fd := range g.raw {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	if g.conn != nil {
		g.conn.Close()
	}
}

// keep takes what the tables are now for right. Tables that the kernel does not
// have are not asked for: that would make them.
func (g *guard) keep() error {
	g.made, g.elements = map[table][sha256.Size]byte{}, map[string]int{}
	for _, ip6 := range []bool{false, true} {
		names, err := legacyTables(ip6)
		if err != nil {
			return err
		}
		for _, name := range []string{"raw", "filter", "nat"} {
			if !slices.Contains(names, name) {
				continue
			}
			t := table{ip6, name}
			if g.made[t], err = g.read(t); err != nil {
				return err
			}
		}
	}
	return nil
}

// legacyTables lists those that the namespace of the calling thread has.
func legacyTables(ip6 bool) ([]string, error) {
	name := "ip_tables_names"
	if ip6 {
		name = "ip6_tables_names"
	}
	b, err := os.ReadFile("/proc/thread-self/net/" + name)
	if os.IsNotExist(err) { // a kernel without the legacy flavour
		return nil, nil
	}
	return strings.Fields(string(b)), err
}

// altered reports whether a table is not as it was kept.
func (g *guard) altered() (bool, error) {
	for _, t := range slices.SortedFunc(maps.Keys(g.made), func(a, b table) int { return strings.Compare(a.name, b.name) }) {
		now, err := g.read(t)
		if err != nil {
			return false, err
		}
		if now != g.made[t] {
			return true, nil
		}
	}
	return false, nil
}

// read is a digest of one table, without what changes by itself.
func (g *guard) read(t table) (sum [sha256.Size]byte, err error) {
	fd, level := g.raw[0], unix.SOL_IP
	if t.ip6 {
		fd, level = g.raw[1], unix.SOL_IPV6
	}
	fail := func(err error) ([sha256.Size]byte, error) {
		return sum, fmt.Errorf("read table %s of the legacy flavour (IPv6 %t): %w", t.name, t.ip6, err)
	}
	for range 10 {
		info := make([]byte, infoSize)
		copy(info, t.name)
		if err := getOption(fd, level, getInfo, info); err != nil {
			return fail(err)
		}
		size := binary.NativeEndian.Uint32(info[infoSize-4:])
		if size > maxTable {
			return sha256.Sum256(info), nil
		}
		entries := make([]byte, entriesHeader+size)
		copy(entries, t.name)
		binary.NativeEndian.PutUint32(entries[tableName:], size)
		if err = getOption(fd, level, getEntries, entries); err == unix.EAGAIN {
			continue // it has just become another
		}
		if err != nil {
			return fail(err)
		}
		return digest(entries[entriesHeader:], t.ip6), nil
	}
	return fail(unix.EAGAIN)
}

// digest is a hash of the entries of a table.
func digest(b []byte, ip6 bool) [sha256.Size]byte {
	at := entryLayout[ip6]
	for entry := b; len(entry) >= at.end; {
		next := int(binary.NativeEndian.Uint16(entry[at.next:]))
		clear(entry[at.comefrom:at.end])
		if next < at.end || next > len(entry) {
			break
		}
		entry = entry[next:]
	}
	return sha256.Sum256(b)
}

func getOption(fd, level, option int, b []byte) error {
	size := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// Messages and attributes of ipset, linux/netfilter/ipset/ip_set.h.
const (
	ipsetList     = 7
	ipsetProtocol = 6

	ipsetAttrProtocol = 1
	ipsetAttrName     = 2
	ipsetAttrFlags    = 6
	ipsetAttrData     = 7
	ipsetAttrElements = 24

	ipsetHeaderOnly = 1 << 2
)

// emptied reports whether a set of ours is gone or has another number of elements
// than it should.
func (g *guard) emptied(r *firewall.Ruleset) (bool, error) {
	for i := range r.Sets {
		s := &r.Sets[i]
		for _, ip6 := range []bool{false, true} {
			if ip6 && !r.IPv6 || !ip6 && !r.IPv4 || s.Kind == firewall.Devices {
				continue
			}
			name := setName(s.Name, ip6)
			want, counted := g.elements[name]
			if !counted {
				want = len(entries(*s, ip6))
				g.elements[name] = want
			}
			if n, err := g.count(name); err != nil || n != want {
				return err == nil, err
			}
		}
	}
	return false, nil
}

// count is how many elements a set has; -1: there is none.
func (g *guard) count(name string) (int, error) {
	n := -1
	err := g.conn.Dump(rtnl.Request{
		Step: "ipset " + name + ": count", Type: unix.NFNL_SUBSYS_IPSET<<8 | ipsetList,
		Header: []byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0},
		Attrs: func(b *rtnl.Batch) {
			b.Attr(ipsetAttrProtocol, ipsetProtocol)
			b.AttrString(ipsetAttrName, name)
			b.Attr(ipsetAttrFlags|unix.NLA_F_NET_BYTEORDER, binary.BigEndian.AppendUint32(nil, ipsetHeaderOnly)...)
		},
	}, func(m rtnl.Message) {
		rtnl.EachAttr(m.Data[min(len(m.Data), 4):], func(typ uint16, data []byte) {
			if typ != ipsetAttrData {
				return
			}
			rtnl.EachAttr(data, func(typ uint16, v []byte) {
				if typ == ipsetAttrElements && len(v) == 4 {
					n = int(binary.BigEndian.Uint32(v))
				}
			})
		})
	}, func() { n = -1 })
	if errors.Is(err, unix.ENOENT) {
		return -1, nil
	}
	return n, err
}
