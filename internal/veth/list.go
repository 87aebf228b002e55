// Package veth lists the host ends of containers' veth pairs.
package veth

import (
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// Link is a host end of ours.
type Link struct {
	Index  int
	Name   string
	Master int // index of the bridge; 0 when it has none
	mark.Alias
}

// List returns every host end of ours in the current network namespace, in the
// kernel's order.
func List() ([]Link, error) {
	c, err := rtnl.Open()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	links, err := c.Links()
	if err != nil {
		return nil, err
	}
	return Of(links), nil
}

// Of picks the host ends out of links.
func Of(links []rtnl.Link) (out []Link) {
	for _, l := range links {
		alias, ok := mark.IsHostEnd(l.Name, l.Alias)
		if ok && l.Kind == "veth" {
			out = append(out, Link{Index: l.Index, Name: l.Name, Master: l.Master, Alias: alias})
		}
	}
	return out
}
