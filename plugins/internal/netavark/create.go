package netavark

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
)

// network is the definition of a network as far as we look at it.
type network struct {
	Name             string            `json:"name"`
	NetworkInterface string            `json:"network_interface"`
	Internal         bool              `json:"internal"`
	Subnets          []json.RawMessage `json:"subnets"`
	Routes           []json.RawMessage `json:"routes"`
	IPAMOptions      map[string]string `json:"ipam_options"`
	Options          map[string]string `json:"options"`
}

// settings are the options of a network: podman network create -o KEY=VALUE.
type settings struct {
	overlay string // empty: the network's name
	runDir  string // empty: where the agent always publishes
	mtu     int    // 0: the overlay's
	hairpin *bool  // nil: on
}

// optionNames are those of d-overlay's configuration.
var optionNames = []string{"overlay", "runDir", "mtu", "hairpinMode"}

// settings reads the options. With an error they are those that can be read.
func (n network) settings() (settings, error) {
	var s settings
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(n.Options)) {
		value := n.Options[key]
		switch key {
		case "overlay":
			s.overlay = value
		case "runDir":
			s.runDir = value
		case "mtu":
			mtu, err := strconv.Atoi(value)
			if err != nil {
				errs = append(errs, fmt.Errorf("option mtu=%s: want a number", value))
				continue
			}
			s.mtu = mtu
		case "hairpinMode":
			on, err := strconv.ParseBool(value)
			if err != nil {
				errs = append(errs, fmt.Errorf("option hairpinMode=%s: want true or false", value))
				continue
			}
			s.hairpin = &on
		default:
			errs = append(errs, fmt.Errorf("option %s is unknown; the options are %s", key, strings.Join(optionNames, ", ")))
		}
	}
	return s, errors.Join(errs...)
}

// create checks the definition of a network and completes it: the addresses are
// the overlay's business and not Podman's, so there is no subnet in it and no
// IPAM driver. Everything it does not know it passes on.
func create(input []byte) (map[string]json.RawMessage, error) {
	var n network
	var all map[string]json.RawMessage
	if err := errors.Join(json.Unmarshal(input, &n), json.Unmarshal(input, &all)); err != nil {
		return nil, fmt.Errorf("read the network from stdin: %w", err)
	}
	s, err := n.settings()
	if err != nil {
		return nil, err
	}
	bridge, ranges, err := findBridge(n.Name, s)
	if err != nil {
		return nil, err
	}
	var has []string
	v6 := false
	for _, r := range ranges {
		has = append(has, r.String())
		v6 = v6 || r.Addr().Is6()
	}
	switch driver := n.IPAMOptions["driver"]; {
	case len(n.Subnets) > 0:
		return nil, fmt.Errorf("the subnet of a network is that of its overlay on this host, %s; leave --subnet, --gateway and --ip-range out", strings.Join(has, " and "))
	case len(n.Routes) > 0:
		return nil, errors.New("routes are those of the overlay; leave --route out")
	case n.Internal:
		return nil, errors.New("an overlay leads to other hosts; leave --internal out")
	case driver != "" && driver != "none":
		return nil, fmt.Errorf("addresses come from the overlay and not from IPAM driver %s; leave --ipam-driver out", driver)
	case n.NetworkInterface != "" && n.NetworkInterface != bridge.Name:
		return nil, fmt.Errorf("the overlay's bridge is %s; leave --interface-name out", bridge.Name)
	}
	for key, value := range map[string]any{
		"network_interface": bridge.Name, "ipv6_enabled": v6, "dns_enabled": false,
		"ipam_options": map[string]string{"driver": "none"},
	} {
		if all[key], err = json.Marshal(value); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// findBridge is the Docker half's bridge of the overlay that the network is of, and
// the half's ranges.
func findBridge(name string, s settings) (*conf.Bridge, []netip.Prefix, error) {
	if s.overlay == "" {
		s.overlay = name
	}
	if err := conf.CheckName(s.overlay); err != nil {
		return nil, nil, fmt.Errorf("overlay name: %w; name another one with -o overlay=NAME", err)
	}
	state, err := cni.LoadState(conf.NetConf{RunDir: s.runDir})
	if err != nil {
		return nil, nil, err
	}
	o, bridge, err := cni.Overlay(state, s.overlay, conf.Docker)
	return bridge, o.Ranges(conf.Docker), err
}
