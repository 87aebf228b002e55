package docker

import (
	"context"
	"maps"
	"net/netip"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
)

// Container is a container of Docker.
type Container struct {
	ID   string // 64 hexadecimal digits
	Name string
}

// known is what a look at Docker's containers has shown.
type known struct {
	byAddress map[netip.Addr]Container
	asked     time.Duration // conf.Boottime before it
}

// Containers are the containers that have addresses of ours, by address, and when Docker
// was asked, as conf.Boottime; nil before the first look. Nobody changes the map.
func (d *Docker) Containers() (byAddress map[netip.Addr]Container, asked time.Duration) {
	if k := d.containers.Load(); k != nil {
		return k.byAddress, k.asked
	}
	return nil, 0
}

// keepContainers remembers who has an address, which was asked then, and tells when that
// is new.
func (d *Docker) keepContainers(used inUse, asked time.Duration) {
	d.unnamed, d.named = false, time.Now()
	now := make(map[netip.Addr]Container, len(used))
	for a, u := range used {
		if isContainerID(u.id) {
			now[a] = Container{u.id, conf.CleanName(u.container)}
		}
	}
	was := d.containers.Swap(&known{now, asked})
	if was != nil && maps.Equal(was.byAddress, now) {
		return
	}
	d.o.ContainersChanged()
}

// isContainerID tells containers from endpoints that are none: Docker lists those as
// "ep-" and a number.
func isContainerID(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}

// nameContainers asks who has the addresses that containers got since the last look.
// It returns how long it is until it may ask again: dockerd is busy when many start.
func (d *Docker) nameContainers(ctx context.Context) (wait time.Duration) {
	if !d.unnamed {
		return 0
	}
	if wait = d.timing.names - time.Since(d.named); wait > 0 {
		return wait
	}
	ctx, cancel := context.WithTimeout(ctx, d.timing.request)
	defer cancel()
	asked := conf.Boottime()
	if used, err := d.client.addresses(ctx); err == nil {
		d.keepContainers(used, asked)
	}
	return 0 // the next look at addresses, which says why it failed, asks again
}
