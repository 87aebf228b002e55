package veth

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
)

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
		if l.Type() != "veth" || a.Alias == "" {
			continue
		}
		alias, ok := ParseAlias(a.Alias)
		if !ok || a.Name != Name(alias.Half, alias.Key()) {
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
