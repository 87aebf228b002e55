// Package veth lists the host ends of containers' veth pairs.
package veth

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/internal/mark"
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
	links, err := listAll()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var out []Link
	for _, l := range links {
		a := l.Attrs()
		alias, ok := mark.IsHostEnd(a.Name, a.Alias)
		if !ok || l.Type() != "veth" {
			continue
		}
		out = append(out, Link{Index: a.Index, Name: a.Name, Master: a.MasterIndex, Alias: alias})
	}
	return out, nil
}

// listAll repeats a dump that changed under the reader: a link may be missing
// from it.
func listAll() (links []netlink.Link, err error) {
	for range 10 {
		links, err = netlink.LinkList()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return links, err
}
