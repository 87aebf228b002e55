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

// Containers are the containers that have addresses of ours, by address, as of the
// last look; nil before the first one. Nobody changes the map.
func (d *Docker) Containers() map[netip.Addr]Container {
	if m := d.containers.Load(); m != nil {
		return *m
	}
	return nil
}

// keepContainers remembers who has an address, and tells when that is new.
func (d *Docker) keepContainers(used inUse) {
	d.unnamed, d.named = false, time.Now()
	now := make(map[netip.Addr]Container, len(used))
	for a, u := range used {
		if isContainerID(u.id) {
			now[a] = Container{u.id, conf.CleanName(u.container)}
		}
	}
	if was := d.containers.Load(); was != nil && maps.Equal(*was, now) {
		return
	}
	d.containers.Store(&now)
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
	if used, err := d.client.addresses(ctx); err == nil {
		d.keepContainers(used)
	}
	return 0 // the next look at addresses, which says why it failed, asks again
}
