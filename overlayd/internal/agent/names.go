package agent

import (
	"net/netip"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// Whose container has an address. CNI programs leave it in the address store; Docker's
// driver is told an address and nothing else, so Docker is asked, which knows it a
// moment later.

// namePatience is how long an address is left out until Docker says whose it is; after
// that it is told under itself.
const namePatience = 3 * time.Second

// maxAddresses is how many addresses one attachment may be told with.
const maxAddresses = 15

// put adds what a record of an overlay's store stands for.
func (v *inventory) put(all map[string]api.Attachment, overlay string, r ipam.Record) {
	a := api.Attachment{
		Network: r.Network, ID: r.ContainerID, IfName: r.IfName, Overlay: overlay, Half: r.Half,
		Addresses: r.Addrs, Since: time.Now().Add(r.Since - conf.Boottime()).Unix(), Runtime: r.Origin.Runtime, Name: r.Origin.Name,
	}
	if !r.IsDocker() {
		all[a.Key()] = a
		return
	}
	a.Runtime = conf.RuntimeDocker
	if v.docker != nil && len(r.Addrs) == 1 {
		known, asked := v.docker()
		c, ok := known[r.Addrs[0]]
		switch {
		case ok && asked >= r.Since: // before that it was another's
			a.ID, a.Name = c.ID, c.Name
		case conf.Boottime()-r.Since < namePatience, known == nil && time.Since(v.first) < namePatience:
			v.unnamed = true
			return
		}
	}
	// A container has one record for each address.
	if other, ok := all[a.Key()]; ok && len(other.Addresses) < maxAddresses {
		a.Addresses = append(slices.Clone(other.Addresses), a.Addresses...)
		slices.SortFunc(a.Addresses, netip.Addr.Compare)
		a.Since = min(a.Since, other.Since)
	} else if ok {
		a = other
	}
	all[a.Key()] = a
}

// keepTimes keeps the times that were told before: the clock of the boot drifts
// against the wall's.
func (v *inventory) keepTimes(all map[string]api.Attachment) {
	for key, a := range all {
		if was, ok := v.seen.put[key]; ok && was.Since-a.Since < 60 && a.Since-was.Since < 60 {
			a.Since = was.Since
			all[key] = a
		}
	}
}
