package cni

import (
	"context"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// gcAge spares a reservation whose ADD may still be on its way: the runtime
// that made GC's list may not have known it.
const gcAge = 60 * time.Second

// GCKeep reads GC's list: which records of the network stay. A missing list is
// not an empty one, and two spellings that differ are no list.
func GCKeep(c *Call) (func(ipam.Record) bool, error) {
	list := c.Conf.ValidAttachments
	if list == nil {
		list = c.Conf.LegacyValidAttachments
	} else if old := c.Conf.LegacyValidAttachments; old != nil && !slices.Equal(*list, *old) {
		return nil, Errorf(types.ErrInvalidNetworkConfig, "configuration: cni.dev/valid-attachments and cni.dev/attachments differ")
	}
	if list == nil {
		return nil, Errorf(types.ErrInvalidNetworkConfig, "configuration: cni.dev/valid-attachments: missing; to release everything, give an empty list")
	}
	valid := make(map[conf.ValidAttachment]bool, len(*list))
	for _, a := range *list {
		valid[a] = true
	}
	now := conf.Boottime()
	return func(r ipam.Record) bool {
		return valid[conf.ValidAttachment{ContainerID: r.ContainerID, IfName: r.IfName}] || now-r.Since < gcAge
	}, nil
}

// GC releases the addresses of the network's attachments in one half that are
// not in GC's list, and returns what they were.
func GC(ctx context.Context, c *Call, half conf.Half) ([]ipam.Record, error) {
	keep, err := GCKeep(c)
	if err != nil {
		return nil, err
	}
	if !StoreExists(c) {
		return nil, nil
	}
	s, err := OpenStore(ctx, c, 0)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	released, err := s.GC(ctx, c.Conf.Name, half, keep)
	return released, StoreError(err)
}
