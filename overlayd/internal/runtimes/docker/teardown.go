package docker

import (
	"context"
	"errors"
	"fmt"
	"net/http"
)

// Teardown removes the networks of ours from the Docker engine at host, and
// reports how many there were. users are the containers that are in them: while
// there are any, nothing is removed without force, and with it they are
// disconnected. Where no engine answers there is nothing to do, and Podman has
// no networks of ours.
func Teardown(ctx context.Context, host string, force bool) (removed int, users []string, err error) {
	c, err := newClient(host)
	if err != nil {
		return 0, nil, err
	}
	defer c.http.CloseIdleConnections()
	if _, err := c.negotiate(ctx); errors.Is(err, errNoEngine) || errors.Is(err, errPodman) {
		return 0, nil, nil
	} else if err != nil {
		return 0, nil, err
	}
	all, err := c.networks(ctx)
	if err != nil {
		return 0, nil, err
	}
	var ours []network
	for _, n := range all {
		if _, ok := n.Labels[label]; !ok {
			continue
		}
		if n, err = c.network(ctx, n.ID); err != nil {
			return 0, nil, fmt.Errorf("inspect docker network: %w", err)
		}
		containers, err := c.containers(ctx, n.ID)
		if err != nil {
			return 0, nil, fmt.Errorf("list the containers of docker network %s: %w", n.Name, err)
		}
		for _, name := range n.users(containers) {
			users = append(users, fmt.Sprintf("container %s (of docker network %s)", name, n.Name))
		}
		ours = append(ours, n)
	}
	if len(users) > 0 && !force {
		return 0, users, nil
	}
	var errs []error
	for _, n := range ours {
		for id := range n.Containers {
			in := map[string]any{"Container": id, "Force": true}
			if err := c.call(ctx, http.MethodPost, c.path("/networks/%s/disconnect", n.ID), in, nil); err != nil && !isStatus(err, http.StatusNotFound) {
				errs = append(errs, fmt.Errorf("disconnect a container from docker network %s: %w", n.Name, err))
			}
		}
		if err := c.remove(ctx, n.ID); err != nil && !isStatus(err, http.StatusNotFound) {
			errs = append(errs, fmt.Errorf("remove docker network %s: %w", n.Name, err))
			continue
		}
		removed++
	}
	return removed, users, errors.Join(errs...)
}
