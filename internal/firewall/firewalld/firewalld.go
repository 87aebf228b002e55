// Package firewalld lets the traffic of the overlays through firewalld, where it
// runs: a zone of ours with target ACCEPT holds VTEP and bridges, and the VXLAN
// port is open in the zone of the underlay. Its own forward chain rejects what no
// zone accepts, so that an accept elsewhere does not help.
//
// It is spoken to over D-Bus, as Docker does. What it was told at run time is
// lost when it reloads or starts again, so it is told for both, run time and
// permanent configuration (see Keeper for when). Sources are never permanent: a
// zone that accepts whole ranges of addresses may only stand behind our own rules,
// and these are gone at boot, after a reload and when we are.
package firewalld

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

const (
	name      = "org.fedoraproject.FirewallD1"
	path      = dbus.ObjectPath("/org/fedoraproject/FirewallD1")
	config    = name + ".config"
	zones     = name + ".zone"
	configObj = path + "/config"
)

// timeout bounds all of it: firewalld answers nobody while it starts.
const timeout = 15 * time.Second

// trusted is the zone of firewalld's own that accepts everything.
const trusted = "trusted"

// defaultSocket is where the system bus listens.
const defaultSocket = "/run/dbus/system_bus_socket"

// Address is that of the system bus: DBUS_SYSTEM_BUS_ADDRESS or the customary one.
func Address() string {
	if a := os.Getenv("DBUS_SYSTEM_BUS_ADDRESS"); a != "" {
		return a
	}
	return "unix:path=" + defaultSocket
}

// Client speaks to the firewalld of the namespace it is used in. The zero value
// speaks to none.
type Client struct{ Address string }

// bus is one conversation.
type bus struct {
	ctx  context.Context
	conn *dbus.Conn
}

// connect answers with nil where there is no bus.
func (c Client) connect(ctx context.Context) *dbus.Conn {
	if c.Address == "" {
		return nil
	}
	if socket, ok := strings.CutPrefix(c.Address, "unix:path="); ok {
		if _, err := os.Stat(socket); err != nil {
			return nil
		}
	}
	conn, err := dbus.Connect(c.Address, dbus.WithContext(ctx))
	if err != nil {
		return nil
	}
	return conn
}

// open answers with nil where there is no firewalld in this network namespace.
func (c Client) open(ctx context.Context) (*bus, error) {
	conn := c.connect(ctx)
	if conn == nil {
		return nil, nil // no bus, no firewalld
	}
	b := &bus{ctx, conn}
	running := false
	if err := b.call(conn.BusObject(), "org.freedesktop.DBus.NameHasOwner", name).Store(&running); err != nil || !running {
		conn.Close()
		return nil, err
	}
	var pid uint32
	if err := b.call(conn.BusObject(), "org.freedesktop.DBus.GetConnectionUnixProcessID", name).Store(&pid); err != nil {
		conn.Close()
		return nil, err
	}
	theirs, err := os.Readlink("/proc/" + strconv.Itoa(int(pid)) + "/ns/net")
	if err == nil {
		var own string
		if own, err = os.Readlink("/proc/thread-self/ns/net"); err == nil && own != theirs {
			conn.Close()
			return nil, nil // that of another namespace
		}
	}
	return b, nil
}

func (b *bus) call(o dbus.BusObject, method string, args ...any) *dbus.Call {
	return o.CallWithContext(b.ctx, method, 0, args...)
}

func (b *bus) daemon(method string, args ...any) *dbus.Call {
	return b.call(b.conn.Object(name, path), method, args...)
}

// Traffic is what is to be let through.
type Traffic struct {
	Devices []string
	// Sources are addresses that come in by the underlay without VXLAN. Our own
	// rules say from whom.
	Sources []netip.Prefix
	// Former are sources that may have been asked for earlier.
	Former   []netip.Prefix
	Underlay string // the device that VXLAN comes in by
	Second   string // the one that VXLAN of the other family comes in by; empty: none does

	withhold bool // leave sources as they are: our own rules may not stand
}

// Ensure puts devices and sources into our zone and opens the VXLAN port, at once
// and, but for sources, in the permanent configuration, so that the next start or
// reload begins with it. It returns how much it changed; where no firewalld runs,
// nothing.
// A zone of ours is there from then on.
func (c Client) Ensure(ctx context.Context, t Traffic) (changed int, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	b, err := c.open(ctx)
	if b == nil || err != nil {
		return 0, explain(err, t)
	}
	defer b.conn.Close()
	changed, err = b.pass(t)
	return changed, explain(err, t)
}

// pass lets traffic through at once, then keeps that.
func (b *bus) pass(t Traffic) (changed int, err error) {
	changed, err = b.port(t)
	if err != nil {
		return changed, err
	}
	zone, err := b.zone()
	if err == nil && zone != "" {
		n, err := b.members(zone, t)
		changed += n
		if err != nil {
			return changed, err
		}
	}
	n, fresh, err := b.keep(t)
	changed += n
	if err != nil || !fresh || zone != "" {
		return changed, err
	}
	// No zone that we could use is there before a reload.
	if err := b.daemon(name + ".reload").Err; err != nil {
		return changed, err
	}
	t.withhold = true // a reload empties the tables of iptables
	n, err = b.members(mark.FirewalldZone, t)
	return changed + n, err
}

func texts(prefixes []netip.Prefix) (out []string) {
	for _, s := range prefixes {
		out = append(out, s.String())
	}
	return out
}

// zone is the one that devices are put into at run time: ours, which comes with a
// reload, and until then the one of firewalld's own that trusts everything. A
// reload takes half a second in which nothing new is let through, and what the
// administrator changed at run time is lost by it; "": there is neither.
func (b *bus) zone() (string, error) {
	var all []string
	if err := b.daemon(zones + ".getZones").Store(&all); err != nil {
		return "", err
	}
	for _, zone := range []string{mark.FirewalldZone, trusted} {
		if slices.Contains(all, zone) {
			return zone, nil
		}
	}
	return "", nil
}

// members makes a zone hold what it should.
func (b *bus) members(zone string, t Traffic) (changed int, err error) {
	changed, err = b.membersOf(zone, interfaces, t.Devices, nil)
	if err != nil || t.withhold {
		return changed, err
	}
	n, err := b.membersOf(zone, sources, texts(t.Sources), texts(t.Former))
	return changed + n, err
}

// membersOf puts things of one kind into a zone and takes others out: where it is
// ours all of them, else those that we had put there.
func (b *bus) membersOf(zone string, kind membership, want, former []string) (changed int, err error) {
	var have []string
	if err := b.daemon(zones+kind.list, zone).Store(&have); err != nil {
		return 0, err
	}
	for _, m := range want {
		if slices.Contains(have, m) {
			continue
		}
		if err := b.daemon(zones+kind.move, zone, m).Err; err != nil {
			return changed, err
		}
		changed++
	}
	stale := slices.DeleteFunc(have, func(m string) bool { return slices.Contains(want, m) })
	if zone != mark.FirewalldZone && len(stale) > 0 {
		if stale, err = b.put(zone, kind, stale, former); err != nil {
			return changed, err
		}
	}
	for _, m := range stale {
		if err := b.daemon(zones+kind.remove, zone, m).Err; err != nil {
			return changed, err
		}
		changed++
	}
	return changed, nil
}

// put are those members of a zone of others that we put there: former ones and
// what our own zone has permanently. What the administrator has there for good
// stays.
func (b *bus) put(zone string, kind membership, members, former []string) ([]string, error) {
	ours, err := b.kept(mark.FirewalldZone, kind)
	if err != nil {
		return nil, err
	}
	theirs, err := b.kept(zone, kind)
	if err != nil {
		return nil, err
	}
	ours = append(ours, former...)
	return slices.DeleteFunc(members, func(m string) bool {
		return !slices.Contains(ours, m) || slices.Contains(theirs, m)
	}), nil
}

// membership names a setting of a zone and the methods for what it may have.
type membership struct{ key, list, move, remove string }

var (
	interfaces = membership{"interfaces", ".getInterfaces", ".changeZoneOfInterface", ".removeInterface"}
	sources    = membership{"sources", ".getSources", ".changeZoneOfSource", ".removeSource"}
)

// underlayZone is the zone of the underlay device.
func (b *bus) underlayZone(device string) (zone string, err error) {
	if device != "" {
		if err := b.daemon(zones+".getZoneOfInterface", device).Store(&zone); err != nil {
			return "", err
		}
	}
	if zone == "" {
		err = b.daemon(name + ".getDefaultZone").Store(&zone)
	}
	return zone, err
}

// port opens the VXLAN port, where our policy does not. Our own rules let only
// peers use it.
func (b *bus) port(t Traffic) (changed int, err error) {
	var active []string
	if err := b.daemon(name + ".policy.getPolicies").Store(&active); err == nil && slices.Contains(active, mark.FirewalldPolicy) {
		return 0, nil
	}
	changed, err = b.openIn(t.Underlay)
	if err == nil && t.Second != "" && t.Second != t.Underlay {
		n, second := b.openIn(t.Second)
		changed, err = changed+n, second
	}
	return changed, err
}

// openIn opens the VXLAN port in the zone of a device.
func (b *bus) openIn(device string) (changed int, err error) {
	zone, err := b.underlayZone(device)
	if err != nil {
		return 0, err
	}
	open := false
	port := strconv.Itoa(conf.VXLANPort)
	if err := b.daemon(zones+".queryPort", zone, port, "udp").Store(&open); err != nil || open {
		return 0, err
	}
	return 1, b.daemon(zones+".addPort", zone, port, "udp", int32(0)).Err
}

// explain says what to do by hand where we may not.
func explain(err error, t Traffic) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("firewalld runs, and does not answer: %w", err)
	}
	var hint strings.Builder
	fmt.Fprintf(&hint, "firewall-cmd --permanent --new-zone=%[1]s; firewall-cmd --permanent --zone=%[1]s --set-target=ACCEPT; firewall-cmd --permanent --zone=%[1]s", mark.FirewalldZone)
	for _, d := range t.Devices {
		fmt.Fprintf(&hint, " --add-interface=%s", d)
	}
	fmt.Fprintf(&hint, "; firewall-cmd --permanent --add-port=%d/udp; firewall-cmd --reload", conf.VXLANPort)
	if len(t.Sources) > 0 {
		fmt.Fprintf(&hint, "; and, after each reload, firewall-cmd --zone=%s", mark.FirewalldZone)
	}
	for _, s := range texts(t.Sources) {
		fmt.Fprintf(&hint, " --add-source=%s", s)
	}
	return fmt.Errorf("firewalld runs and stops traffic between hosts, and it does not let us change that (%w); type: %s", err, hint.String())
}
