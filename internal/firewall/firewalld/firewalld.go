// Package firewalld lets the traffic of the overlays through firewalld, where it
// runs: a zone of ours with target ACCEPT holds VTEP and bridges, and the VXLAN
// port is open in the zone of the underlay. Its own forward chain rejects what no
// zone accepts, so that an accept elsewhere does not help.
//
// It is spoken to over D-Bus, as Docker does. What it was told at run time is
// lost when it reloads, so the agent asks again whenever its rules change.
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
const timeout = 5 * time.Second

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

// open answers with nil where there is no firewalld in this network namespace.
func (c Client) open(ctx context.Context) (*bus, error) {
	if c.Address == "" {
		return nil, nil
	}
	if socket, ok := strings.CutPrefix(c.Address, "unix:path="); ok {
		if _, err := os.Stat(socket); err != nil {
			return nil, nil
		}
	}
	conn, err := dbus.Connect(c.Address, dbus.WithContext(ctx))
	if err != nil {
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
	Sources  []netip.Prefix
	Underlay string // the device that VXLAN comes in by
}

// Ensure puts devices and sources into our zone and opens the VXLAN port towards
// the underlay device. It returns how much it changed; where no firewalld runs,
// nothing.
func (c Client) Ensure(ctx context.Context, t Traffic) (changed int, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	b, err := c.open(ctx)
	if b == nil || err != nil {
		return 0, explain(err, t)
	}
	defer b.conn.Close()
	n, err := b.zone()
	changed += n
	if err == nil {
		n, err = b.members(interfaces, t.Devices)
		changed += n
	}
	if err == nil {
		n, err = b.members(sources, t.sources())
		changed += n
	}
	if err == nil {
		n, err = b.port(t.Underlay)
		changed += n
	}
	return changed, explain(err, t)
}

func (t Traffic) sources() (out []string) {
	for _, s := range t.Sources {
		out = append(out, s.String())
	}
	return out
}

// zone makes our zone where it is not there. A zone is made in the permanent
// configuration and comes with a reload.
func (b *bus) zone() (changed int, err error) {
	var all []string
	if err := b.daemon(zones + ".getZones").Store(&all); err != nil {
		return 0, err
	}
	if slices.Contains(all, mark.FirewalldZone) {
		return 0, nil
	}
	settings := map[string]any{
		"target": "ACCEPT", "short": mark.FirewalldZone,
		"description": "VTEP and bridges of the container overlays. Made by overlayd.",
	}
	err = b.call(b.conn.Object(name, configObj), config+".addZone2", mark.FirewalldZone, settings).Err
	if err != nil && !strings.Contains(err.Error(), "NAME_CONFLICT") {
		return 0, err
	}
	return 1, b.daemon(name + ".reload").Err
}

// members puts things of one kind into our zone, and takes others out.
func (b *bus) members(kind membership, want []string) (changed int, err error) {
	var have []string
	if err := b.daemon(zones+kind.list, mark.FirewalldZone).Store(&have); err != nil {
		return 0, err
	}
	for _, m := range want {
		if slices.Contains(have, m) {
			continue
		}
		if err := b.daemon(zones+kind.move, mark.FirewalldZone, m).Err; err != nil {
			return changed, err
		}
		changed++
	}
	for _, m := range have {
		if slices.Contains(want, m) {
			continue
		}
		if err := b.daemon(zones+kind.remove, mark.FirewalldZone, m).Err; err != nil {
			return changed, err
		}
		changed++
	}
	return changed, nil
}

// membership names the methods for what a zone may have.
type membership struct{ list, move, remove string }

var (
	interfaces = membership{".getInterfaces", ".changeZoneOfInterface", ".removeInterface"}
	sources    = membership{".getSources", ".changeZoneOfSource", ".removeSource"}
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

// port opens the VXLAN port. Our own rules let only peers use it.
func (b *bus) port(underlay string) (changed int, err error) {
	zone, err := b.underlayZone(underlay)
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

// Remove takes out what Ensure made.
func (c Client) Remove(ctx context.Context, underlay string) (changed int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*timeout)
	defer cancel()
	b, err := c.open(ctx)
	if b == nil || err != nil {
		return 0, err
	}
	defer b.conn.Close()
	var zone dbus.ObjectPath
	err = b.call(b.conn.Object(name, configObj), config+".getZoneByName", mark.FirewalldZone).Store(&zone)
	if err != nil {
		if strings.Contains(err.Error(), "INVALID_ZONE") {
			return 0, nil
		}
		return 0, fmt.Errorf("firewalld: %w", err)
	}
	if in, err := b.underlayZone(underlay); err == nil {
		_ = b.daemon(zones+".removePort", in, strconv.Itoa(conf.VXLANPort), "udp").Err
	}
	if err := b.call(b.conn.Object(name, zone), config+".zone.remove").Err; err != nil {
		return 0, fmt.Errorf("firewalld: remove zone %s: %w", mark.FirewalldZone, err)
	}
	return 1, b.daemon(name + ".reload").Err
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
	for _, s := range t.sources() {
		fmt.Fprintf(&hint, " --add-source=%s", s)
	}
	fmt.Fprintf(&hint, "; firewall-cmd --permanent --add-port=%d/udp; firewall-cmd --reload", conf.VXLANPort)
	return fmt.Errorf("firewalld runs and stops traffic between hosts, and it does not let us change that (%w); type: %s", err, hint.String())
}
