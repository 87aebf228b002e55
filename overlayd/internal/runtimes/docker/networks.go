package docker

import (
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// label marks the networks that are ours; its value is the overlay.
const label = "overlayd.overlay"

// Options of Docker's bridge driver.
const (
	optionName = "com.docker.network.bridge.name"
	optionMasq = "com.docker.network.bridge.enable_ip_masquerade"
	// optionNoIPv4 keeps the driver's hands off the bridge's IPv4 address, which
	// is the agent's business.
	optionNoIPv4 = "com.docker.network.bridge.inhibit_ipv4"
	optionMTU    = "com.docker.network.driver.mtu"
	optionMode4  = "com.docker.network.bridge.gateway_mode_ipv4"
	optionMode6  = "com.docker.network.bridge.gateway_mode_ipv6"
	// modeUnprotected lets other hosts reach the containers: from Docker 28 on
	// the driver drops what does not come through a published port.
	modeUnprotected = "nat-unprotected"
)

// sync makes networks and, if wanted, addresses what they should be. It reports
// whether all went well.
func (d *Docker) sync(ctx context.Context, addresses bool) bool {
	ctx, cancel := context.WithTimeout(ctx, 3*d.timing.request)
	defer cancel()
	d.mu.Lock()
	w := d.wanted
	d.mu.Unlock()
	fine := w == nil || d.syncNetworks(ctx, *w)
	if addresses && !d.note(ctx, addressesProblem, d.syncAddresses(ctx)) {
		fine = false
	}
	return fine
}

// syncNetworks makes one network for each overlay with a Docker bridge and
// removes those of ours that are no longer wanted.
func (d *Docker) syncNetworks(ctx context.Context, w wanted) bool {
	have, err := d.client.networks(ctx)
	if !d.note(ctx, engineProblem, err) {
		return false
	}
	d.noteRemoved(have)
	overlays := map[string]conf.AgentOverlay{}
	for _, o := range w.overlays {
		if len(halves(o)) > 0 {
			overlays[o.Info.Name] = o
		}
	}
	touched := map[string]bool{} // what problems are kept of
	fine := true
	note := func(name string, err error) {
		touched[name] = true
		if !d.note(ctx, networkProblem+name, err) {
			fine = false
		}
	}
	// What has to go goes first: it may be in the way of what is to come.
	for _, n := range have {
		if overlay, ours := n.Labels[label]; ours && (overlays[n.Name].Info.Name == "" || n.Name != overlay) {
			note(n.Name, d.removeNetwork(ctx, n, "its overlay is no longer leased to this host"))
		}
	}
	names := make([]string, 0, len(overlays))
	for name := range overlays {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		note(name, d.ensure(ctx, overlays[name], w.mtu, have))
	}
	d.onlyProblems(touched)
	return fine
}

// noteRemoved notes which networks have gone since the last look. Docker's event
// comes too late for that: a network is off the list before its bridge and its
// addresses are, and only then Docker tells.
func (d *Docker) noteRemoved(have []network) {
	before := d.there
	d.there = make(map[string]bool, len(have))
	for _, n := range have {
		d.there[n.Name] = true
	}
	for name := range before {
		if !d.there[name] {
			d.removed[name] = time.Now()
		}
	}
}

// ensure makes the overlay's network what it should be.
func (d *Docker) ensure(ctx context.Context, o conf.AgentOverlay, mtu int, have []network) error {
	name := o.Info.Name
	want := d.want(o, mtu, have)
	i := slices.IndexFunc(have, func(n network) bool { return n.Name == name })
	if i >= 0 {
		differs := difference(want, have[i])
		if differs == "" {
			return nil
		}
		if _, ours := have[i].Labels[label]; !ours {
			return fmt.Errorf("there is one of that name that the agent did not make, and %s; remove it (docker network rm %s), the agent makes it anew", differs, name)
		}
		if err := d.removeNetwork(ctx, have[i], differs); err != nil {
			return err
		}
	} else if _, held := d.removed[name]; held {
		return nil // there is a round when the time is over
	}
	err := d.client.create(ctx, want)
	if only6(o) && want.EnableIPv4 != nil && isStatus(err, http.StatusBadRequest) {
		// The first engines that can do without IPv4 want to be asked for
		// experiments.
		want.EnableIPv4 = nil
		d.addBystander(&want, have)
		err = d.client.create(ctx, want)
	}
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	d.there[name] = true
	d.log.Info("docker network created", logkey.Network, name, logkey.Bridge, want.Options[optionName], logkey.Subnets, join(halves(o)))
	return nil
}

// removeNetwork removes a network of ours that no container uses.
func (d *Docker) removeNetwork(ctx context.Context, n network, why string) error {
	n, err := d.client.network(ctx, n.ID)
	if isStatus(err, http.StatusNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("inspect: %w", err)
	}
	containers, err := d.client.containers(ctx, n.ID)
	if err != nil {
		return fmt.Errorf("list its containers: %w", err)
	}
	if users := n.users(containers); users != nil {
		return fmt.Errorf("%s, and it is used by %s; remove these containers or detach them (docker network disconnect), then the agent sees to the rest",
			why, strings.Join(users, ", "))
	}
	if err := d.client.remove(ctx, n.ID); err != nil {
		return fmt.Errorf("%s; remove it: %w", why, err)
	}
	delete(d.there, n.Name)
	d.log.Info("docker network removed", logkey.Network, n.Name, logkey.Reason, why)
	return nil
}

// maxUsers is how many containers a message names.
const maxUsers = 5

// users are the containers of a network. Stopped ones are among them: they know
// the network by its ID, and could not be started in another of its name.
func (n network) users(containers []string) []string {
	out := containers
	for _, e := range n.Containers {
		out = append(out, e.Name)
	}
	sort.Strings(out)
	out = slices.Compact(out)
	if more := len(out) - maxUsers; more > 0 {
		out = append(out[:maxUsers], fmt.Sprintf("%d more", more))
	}
	return out
}

// only6 reports whether the overlay has no IPv4 here.
func only6(o conf.AgentOverlay) bool { return len(halves(o)) == 1 && halves(o)[0].Addr().Is6() }

// want is the network of an overlay, for the engine we talk to.
func (d *Docker) want(o conf.AgentOverlay, mtu int, have []network) network {
	name := o.Info.Name
	n := network{
		Name: name, Driver: "bridge", CheckDuplicate: true,
		IPAM:   ipamSettings{Driver: Driver, Options: map[string]string{overlayOption: name}},
		Labels: map[string]string{label: name},
		Options: map[string]string{
			optionName: o.DockerBridge.Name, optionMasq: "false", optionNoIPv4: "true",
			optionMTU: strconv.Itoa(mtu),
		},
	}
	for _, p := range halves(o) {
		n.IPAM.Config = append(n.IPAM.Config, ipamConfig{Subnet: p.String(), Gateway: conf.Gateway(p).String()})
		n.EnableIPv6 = n.EnableIPv6 || p.Addr().Is6()
	}
	modern := !older(d.client.api(), "1.48")
	if modern {
		n.Options[optionMode4] = modeUnprotected
		if n.EnableIPv6 {
			n.Options[optionMode6] = modeUnprotected
		}
	}
	switch {
	case !only6(o):
	case modern:
		no := false
		n.EnableIPv4 = &no
		delete(n.Options, optionMode4)
	default:
		d.addBystander(&n, have)
	}
	return n
}

// addBystander gives a network of an IPv6 overlay the IPv4 subnet that the
// engine insists on.
func (d *Docker) addBystander(n *network, have []network) {
	var taken []netip.Prefix
	for _, other := range have {
		if other.Name != n.Name {
			taken = append(taken, other.subnets()...)
		}
	}
	if p := bystander(n.Name, taken); p.IsValid() {
		n.IPAM.Config = append(n.IPAM.Config, ipamConfig{Subnet: p.String(), Gateway: conf.Gateway(p).String()})
	}
}

func (n network) subnets() (out []netip.Prefix) {
	for _, c := range n.IPAM.Config {
		if p, err := netip.ParsePrefix(c.Subnet); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// difference says what is wrong with a network, or nothing. An option that we
// have no opinion about is the user's.
func difference(want, have network) string {
	switch {
	case have.Driver != want.Driver:
		return fmt.Sprintf("its driver is %s", have.Driver)
	case have.Internal:
		return "it is internal"
	case have.EnableIPv6 != want.EnableIPv6:
		return fmt.Sprintf("its IPv6 is %s", onOff(have.EnableIPv6))
	case have.IPAM.Driver != want.IPAM.Driver:
		return fmt.Sprintf("its IPAM driver is %s", have.IPAM.Driver)
	case have.IPAM.Options[overlayOption] != want.IPAM.Options[overlayOption]:
		return fmt.Sprintf("its addresses are of overlay %q", have.IPAM.Options[overlayOption])
	}
	if w, h := want.ipamText(), have.ipamText(); w != h {
		return fmt.Sprintf("it has %s where the lease has %s", h, w)
	}
	keys := make([]string, 0, len(want.Options))
	for k := range want.Options {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		if have.Options[k] != want.Options[k] {
			return fmt.Sprintf("its option %s is %q instead of %q", k, have.Options[k], want.Options[k])
		}
	}
	return ""
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// ipamText is the subnets with all that matters about them, in order. Bystanders
// do not: any will do. Nor do ranges, which are the user's business, or a gateway
// that is not named: then the driver chose it.
func (n network) ipamText() string {
	var out []string
	for _, c := range n.IPAM.Config {
		p, err := netip.ParsePrefix(c.Subnet)
		if err != nil || isBystander(p) {
			continue
		}
		if gateway, _, _ := strings.Cut(c.Gateway, "/"); gateway != "" && gateway != conf.Gateway(p).String() {
			out = append(out, c.Subnet+" with gateway "+gateway)
			continue
		}
		out = append(out, c.Subnet)
	}
	sort.Strings(out)
	if out == nil {
		return "no subnet"
	}
	return strings.Join(out, ", ")
}
