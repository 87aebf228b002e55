package audit

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/veth"
	"overlayd.internal/overlay/ipam"
)

// overlays are the names of all that any book knows, in order.
func (c *comparison) overlays() []string {
	names := map[string]bool{}
	for _, o := range c.State.Overlays {
		names[o.Info.Name] = true
	}
	for name := range c.Stores {
		names[name] = true
	}
	for _, l := range c.Links {
		names[l.Overlay] = true
	}
	return slices.Sorted(maps.Keys(names))
}

// entry is an attachment as the store and the kernel know it.
type entry struct {
	rec  *ipam.Record
	link *veth.Link
}

// store compares one overlay's store with the kernel's links and the lease.
func (c *comparison) store(name string) {
	s := c.Stores[name]
	if s.Err != nil {
		c.add(name, "the address store cannot be read: %v", s.Err)
		return
	}
	for _, p := range s.Problems {
		c.add(name, "the address store is not in order: %s; stop this overlay's containers on this host, remove its .db file and start them again", p)
	}
	if len(s.Problems) > 0 {
		return
	}
	entries := map[conf.Key]*entry{}
	at := func(k conf.Key) *entry {
		if entries[k] == nil {
			entries[k] = &entry{}
		}
		return entries[k]
	}
	for i := range s.Records {
		at(mark.KeyOf(s.Records[i].Attachment)).rec = &s.Records[i]
	}
	owners := map[netip.Addr]string{}
	for i := range c.Links {
		l := &c.Links[i]
		if l.Overlay != name {
			continue
		}
		at(l.Key()).link = l
		for _, a := range l.Addrs {
			if other := owners[a]; other != "" {
				c.add(name, "interfaces %s and %s both have %s; stop one of the containers", other, l.Name, a)
			}
			owners[a] = l.Name
		}
	}
	keys := slices.SortedFunc(maps.Keys(entries), func(a, b conf.Key) int { return cmp.Compare(a.String(), b.String()) })
	for _, k := range keys {
		c.entry(name, k, *entries[k])
	}
}

func (c *comparison) entry(overlay string, key conf.Key, e entry) {
	if e.rec != nil {
		c.lease(overlay, *e.rec)
	}
	switch {
	case e.link == nil && e.rec.IsDocker():
		return // it makes links of its own
	case e.link == nil:
		c.noLink(overlay, key, *e.rec)
		return
	case e.rec == nil:
		c.add(overlay, "interface %s of %s has %v, and the address store does not know it; delete the container", e.link.Name, e.link.Attachment, e.link.Addrs)
	case e.rec.Half != e.link.Half || !slices.Equal(e.rec.Addrs, e.link.Addrs):
		c.add(overlay, "%s has %v of the %s half in the address store, and its interface %s has %v of the %s half; delete the container",
			e.rec.Attachment, e.rec.Addrs, e.rec.Half, e.link.Name, e.link.Addrs, e.link.Half)
	}
}

// noLink looks at a record without an interface of ours.
func (c *comparison) noLink(overlay string, key conf.Key, rec ipam.Record) {
	name := mark.HostEnd(rec.Half, key)
	switch is := c.Altered[name]; {
	case is == name:
		c.add(overlay, "%s has %v in the address store, and its interface %s has lost the alias that says so; delete the container", rec.Attachment, rec.Addrs, name)
	case is != "":
		c.add(overlay, "%s has %v in the address store, and its interface %s is called %s; delete the container, and remove the interface if it is still there: ip link delete %s",
			rec.Attachment, rec.Addrs, name, is, is)
	case rec.NetNS.Path == "":
		c.add(overlay, "%s has %v in the address store and no interface %s; delete the container, or leave it to the agent, which releases it after a minute",
			rec.Attachment, rec.Addrs, name)
	case c.Stores[overlay].Gone[key]:
		c.add(overlay, "%s has %v in the address store, and its network namespace %s is gone; delete the container, or leave it to the agent, which releases it after a minute",
			rec.Attachment, rec.Addrs, rec.NetNS.Path)
	}
}

// Abandoned are the overlay's records whose container is gone: neither a host
// end, by whatever name or alias, nor, where there never was one, the namespace is there.
func (h Host) Abandoned(overlay string) (out []ipam.Record) {
	linked := map[conf.Key]bool{}
	for _, l := range h.Links {
		linked[l.Key()] = true
	}
	s := h.Stores[overlay]
	for _, rec := range s.Records {
		key := mark.KeyOf(rec.Attachment)
		if h.Altered[mark.HostEnd(rec.Half, key)] != "" {
			continue
		}
		if !linked[key] && !rec.IsDocker() && (rec.NetNS.Path == "" || s.Gone[key]) {
			out = append(out, rec)
		}
	}
	return out
}

// lease compares a record with what the host has been leased.
func (c *comparison) lease(overlay string, rec ipam.Record) {
	if c.StateErr != nil {
		return // said already
	}
	var in []netip.Prefix
	if o, ok := c.State.Overlay(overlay); ok {
		in = o.Ranges(rec.Half)
	}
	for _, a := range rec.Addrs {
		if rec.IsDocker() && a.Is4() && a.IsLinkLocalUnicast() {
			continue // an older Docker wants IPv4 addresses in an IPv6 overlay too
		}
		ok := slices.ContainsFunc(in, func(p netip.Prefix) bool {
			return p.Contains(a) && !a.Less(conf.FirstContainer(p)) && !conf.LastContainer(p).Less(a)
		})
		if !ok {
			c.add(overlay, "%s has %s, which is not among the addresses leased to the %s half here %v; delete the container", rec.Attachment, a, rec.Half, in)
		}
	}
}
