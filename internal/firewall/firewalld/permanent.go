package firewalld

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/godbus/dbus/v5"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// object is something of ours in the permanent configuration.
type object struct {
	name        string
	find, add   string // methods of the configuration
	get, update string // its own
	remove      string
	missing     string // the error that says that there is none
	settings    map[string]any
	// forgiving: an older firewalld does not know such a thing.
	forgiving bool
}

// port is a port as D-Bus has it.
type port struct{ Port, Protocol string }

// objects are a zone, which accepts everything from and to what is in it, and a
// policy, which opens the VXLAN port whatever zone it comes in by: the zone of
// the underlay is not ours to change for good.
func objects(t Traffic) []object {
	return []object{
		{
			name: mark.FirewalldZone, find: ".getZoneByName", add: ".addZone2", missing: "INVALID_ZONE",
			get: config + ".zone.getSettings2", update: config + ".zone.update2", remove: config + ".zone.remove",
			settings: map[string]any{
				"target": "ACCEPT", "short": mark.FirewalldZone,
				"description":  "VTEP and bridges of the container overlays. Made by overlayd.",
				interfaces.key: slices.Sorted(slices.Values(t.Devices)), sources.key: []string{},
			},
		},
		{
			name: mark.FirewalldPolicy, find: ".getPolicyByName", add: ".addPolicy", missing: "INVALID_POLICY",
			get: config + ".policy.getSettings", update: config + ".policy.update", remove: config + ".policy.remove",
			settings: map[string]any{
				"target": "CONTINUE", "short": mark.FirewalldPolicy,
				"description":   "VXLAN between the hosts of the container overlays; rules of overlayd's own say from whom. Made by overlayd.",
				"ingress_zones": []string{"ANY"}, "egress_zones": []string{"HOST"},
				"ports": []port{{strconv.Itoa(conf.VXLANPort), "udp"}},
			},
			forgiving: true,
		},
	}
}

// keep writes what is to be let through into the permanent configuration. What is
// fresh there comes with a reload.
func (b *bus) keep(t Traffic) (changed int, fresh bool, err error) {
	for _, o := range objects(t) {
		n, added, err := b.keepOne(o)
		if err != nil && !(o.forgiving && unknown(err)) {
			return changed, fresh, err
		}
		changed += n
		fresh = fresh || added
	}
	return changed, fresh, nil
}

func (b *bus) keepOne(o object) (changed int, added bool, err error) {
	root := b.conn.Object(name, configObj)
	var at dbus.ObjectPath
	err = b.call(root, config+o.find, o.name).Store(&at)
	if err != nil && strings.Contains(err.Error(), o.missing) {
		return 1, true, b.call(root, config+o.add, o.name, o.settings).Err
	}
	if err != nil {
		return 0, false, err
	}
	have := map[string]dbus.Variant{}
	if err := b.call(b.conn.Object(name, at), o.get).Store(&have); err != nil {
		return 0, false, err
	}
	if o.same(have) {
		return 0, false, nil
	}
	return 1, false, b.call(b.conn.Object(name, at), o.update, o.settings).Err
}

// kept are the members of one kind that a zone has permanently, none where there
// is no such zone.
func (b *bus) kept(zone string, kind membership) (members []string, err error) {
	var at dbus.ObjectPath
	err = b.call(b.conn.Object(name, configObj), config+".getZoneByName", zone).Store(&at)
	if err != nil && strings.Contains(err.Error(), "INVALID_ZONE") {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	have := map[string]dbus.Variant{}
	if err := b.call(b.conn.Object(name, at), config+".zone.getSettings2").Store(&have); err != nil {
		return nil, err
	}
	if v, ok := have[kind.key]; ok {
		err = v.Store(&members)
	}
	return members, err
}

// same reports whether the settings that we make are as they should be; an
// administrator may have added others.
func (o object) same(have map[string]dbus.Variant) bool {
	for key, want := range o.settings {
		v, ok := have[key]
		switch want := want.(type) {
		case []string:
			var got []string
			if ok && v.Store(&got) != nil {
				return false
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				return false
			}
		case []port:
			var got []port
			if !ok || v.Store(&got) != nil || !reflect.DeepEqual(got, want) {
				return false
			}
		default:
			if !ok || v.Value() != want {
				return false
			}
		}
	}
	return true
}

// unknown reports whether firewalld does not know a method.
func unknown(err error) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == "org.freedesktop.DBus.Error.UnknownMethod"
}

// Remove takes out what Ensure made.
func (c Client) Remove(ctx context.Context, underlay string) (changed int, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	b, err := c.open(ctx)
	if b == nil || err != nil {
		return 0, err
	}
	defer b.conn.Close()
	in, err := b.underlayZone(underlay)
	if err != nil {
		return 0, fmt.Errorf("firewalld: %w", err)
	}
	for _, o := range objects(Traffic{}) {
		n, err := b.removeOne(o)
		changed += n
		if err != nil {
			return changed, fmt.Errorf("firewalld: remove %s: %w", o.name, err)
		}
	}
	if changed == 0 {
		return 0, nil
	}
	_ = b.daemon(zones+".removePort", in, strconv.Itoa(conf.VXLANPort), "udp").Err // where it was opened at run time
	return changed, b.daemon(name + ".reload").Err
}

func (b *bus) removeOne(o object) (changed int, err error) {
	var at dbus.ObjectPath
	err = b.call(b.conn.Object(name, configObj), config+o.find, o.name).Store(&at)
	if err != nil && (strings.Contains(err.Error(), o.missing) || o.forgiving && unknown(err)) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	have := map[string]dbus.Variant{}
	if err := b.call(b.conn.Object(name, at), o.get).Store(&have); err != nil {
		return 0, err
	}
	// A reload leaves every device in the zone that it is in. Sources that are not
	// permanent go with it.
	for _, kind := range []membership{interfaces, sources} {
		var members []string
		if v, ok := have[kind.key]; ok && v.Store(&members) == nil {
			for _, m := range members {
				_ = b.daemon(zones+kind.remove, "", m).Err // from whatever zone, if any
			}
		}
	}
	return 1, b.call(b.conn.Object(name, at), o.remove).Err
}
