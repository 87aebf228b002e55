package engines

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// Engine launches containers on one host.
type Engine interface {
	// Name is the program and how it is used, as in the table of results.
	Name() string
	// Version is what the program itself says.
	Version(ctx context.Context) (string, error)
	// Start starts what has to run and loads the images. It returns when the
	// engine is ready.
	Start(ctx context.Context) error
	// Run launches a container that serves its own name as a page on port 80,
	// and returns when it runs.
	Run(ctx context.Context, s Spec) (*Container, error)
}

// Spec is a wish for a container.
type Spec struct {
	Name    string
	Network string   // an engine without a choice of networks ignores it
	Ports   []string // HOST:CONTAINER
	Args    []string // further arguments of the engine's own, before the image
}

// Container is a running container.
type Container struct {
	Name string
	// IDs are what the engine calls it and its parts.
	ID, Sandbox string
	// IPs are its addresses on the network, as the engine reports them.
	IPs []netip.Addr
	// Netns is its network namespace, a path on the host; empty where the
	// engine does not say.
	Netns string

	exec   func(ctx context.Context, args ...string) (string, error)
	remove func(ctx context.Context) error
}

// Exec runs a program inside the container and returns what it printed.
func (c *Container) Exec(ctx context.Context, args ...string) (string, error) {
	return c.exec(ctx, args...)
}

// Remove stops and removes the container the way the engine's users do.
func (c *Container) Remove(ctx context.Context) error { return c.remove(ctx) }

// Ping sends packets from the container until one is answered, for at most
// ten seconds: the first may meet an IPv6 address that is still being checked
// for duplicates.
func (c *Container) Ping(ctx context.Context, to netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return Wait(ctx, func() error {
		_, err := c.Exec(ctx, "timeout", "5", "ping", "-c", "1", "-W", "1", to.String())
		return err
	})
}

// Get fetches the page at an address from inside the container. It repeats that
// for at most ten seconds: the other may have been started just now, and on a
// busy machine ctr sometimes ends before it has copied what the program said. No
// page of ours is empty.
func (c *Container) Get(ctx context.Context, from netip.AddrPort) (page string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err = Wait(ctx, func() error {
		// The limit is timeout's: wget -T crashes in Debian's static busybox.
		page, err = c.Exec(ctx, "timeout", "5", "wget", "-q", "-O", "-", "http://"+from.String()+"/")
		if err == nil && page == "" {
			err = errors.New("an empty page")
		}
		return err
	})
	return page, err
}

// Addrs are the global addresses the container's interface really has.
func (c *Container) Addrs(ctx context.Context, ifname string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var out string
	err := Wait(ctx, func() (err error) {
		out, err = c.Exec(ctx, "ip", "-o", "addr", "show", "dev", ifname)
		if err == nil && out == "" {
			err = fmt.Errorf("interface %s has no address", ifname) // or ctr lost the output, as in Get
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return parseAddrs(out)
}

// parseAddrs reads the global addresses in the output of "ip -o addr".
func parseAddrs(out string) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		for i := 0; i+1 < len(f); i++ {
			if (f[i] != "inet" && f[i] != "inet6") || !strings.Contains(line, "scope global") {
				continue
			}
			p, err := netip.ParsePrefix(f[i+1])
			if err != nil {
				return nil, fmt.Errorf("address in %q: %w", line, err)
			}
			addrs = append(addrs, p.Addr())
		}
	}
	return addrs, nil
}

// networkSettings are what Docker and Podman know of a container's networks.
type networkSettings struct {
	SandboxKey string
	Networks   map[string]endpoint
}

type endpoint struct{ IPAddress, GlobalIPv6Address string }

func (e endpoint) ips() ([]netip.Addr, error) { return parseIPs(e.IPAddress, e.GlobalIPv6Address) }

// inspect asks docker or podman for the network settings of a container.
func (h *Host) inspect(ctx context.Context, program, container string) (out networkSettings, err error) {
	text, err := h.Exec(ctx, program, "inspect", "-f", "{{json .NetworkSettings}}", container)
	if err != nil {
		return out, err
	}
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		return out, fmt.Errorf("%s inspect: %w", program, err)
	}
	return out, nil
}

// parseIPs reads addresses of which some may be empty.
func parseIPs(texts ...string) ([]netip.Addr, error) {
	var ips []netip.Addr
	var errs []error
	for _, s := range texts {
		if s == "" {
			continue
		}
		ip, err := netip.ParseAddr(s)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		ips = append(ips, ip)
	}
	return ips, errors.Join(errs...)
}
