package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// The halves of an agent subnet.
const (
	Mesos  = "mesos"
	Docker = "docker"
)

// Container is a network namespace attached to one half of an overlay.
type Container struct {
	*Netns
	Short   string // the name without the lab's
	Host    *Host
	Overlay string
	Half    string
	Addrs   []netip.Prefix

	stdin []byte // what the Mesos half's ADD got; its DEL gets the same
}

// Attach makes a namespace and attaches it the way the half's runtime does: the
// Docker half with cnitool and the conflist the agent wrote, the Mesos half as
// Mesos' network/cni isolator does. When the ADD fails, the namespace is still
// there.
func (h *Host) Attach(ctx context.Context, name, overlay, half string) (*Container, error) {
	short := filepath.Base(h.Dir) + "-" + name
	ns, err := h.Lab.Netns(ctx, short)
	if err != nil {
		return nil, err
	}
	c := &Container{Netns: ns, Short: short, Host: h, Overlay: overlay, Half: half}
	return c, c.Add(ctx)
}

// Add attaches the container and fills in Addrs.
func (c *Container) Add(ctx context.Context) (err error) {
	if c.Half == Mesos {
		c.Addrs, err = c.ucrAdd(ctx)
	} else {
		c.Addrs, err = c.cnitoolAdd(ctx)
	}
	return err
}

// Del detaches the container; its namespace stays.
func (c *Container) Del(ctx context.Context) error {
	if c.Half == Mesos {
		_, err := c.ucr(ctx, "DEL")
		return err
	}
	_, err := c.cnitool(ctx, "del")
	return err
}

// Remove detaches the container and deletes its namespace.
func (c *Container) Remove(ctx context.Context) error {
	return errors.Join(c.Del(ctx), c.Delete(ctx))
}

// Addr is the container's address of the overlay's only, or first, family.
func (c *Container) Addr() netip.Addr {
	if len(c.Addrs) == 0 {
		return netip.Addr{}
	}
	return c.Addrs[0].Addr()
}

// cnitool runs cnitool on the host. libcni caches results in /var/lib/cni; every
// host gets its own there.
func (c *Container) cnitool(ctx context.Context, verb string) ([]byte, error) {
	h := c.Host
	cmd := h.Command(ctx, "unshare", "--mount", "--propagation", "private", "sh", "-c",
		`mkdir -p /var/lib/cni && mount --bind "$0" /var/lib/cni && exec "$@"`, h.cniCache,
		h.Lab.CNITool, verb, c.Overlay, c.Path)
	cmd.Env = append(os.Environ(), "NETCONFPATH="+h.CNIConfDir, "CNI_PATH="+h.Lab.Bin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: cnitool %s %s: %w: %s%s", c.Name, verb, c.Overlay, err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes(), nil
}

func (c *Container) cnitoolAdd(ctx context.Context) ([]netip.Prefix, error) {
	out, err := c.cnitool(ctx, "add")
	if err != nil {
		return nil, err
	}
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal(out, &result); err != nil {
		return nil, fmt.Errorf("%s: result of cnitool add: %w: %s", c.Name, err, out)
	}
	var addrs []netip.Prefix
	for _, ip := range result.IPs {
		addrs = append(addrs, ip.Address)
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("%s: cnitool add reports no address: %s", c.Name, out)
	}
	return addrs, nil
}

// ucrStdin is what the isolator passes to the plugin: the network's file with
// args added and the keys sorted, which a Go map gives for nothing.
func (c *Container) ucrStdin() ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(c.Host.UCRConfDir, c.Overlay+".conf"))
	if err != nil {
		return nil, err
	}
	var conf map[string]any
	if err := json.Unmarshal(b, &conf); err != nil {
		return nil, fmt.Errorf("%s.conf: %w", c.Overlay, err)
	}
	conf["args"] = map[string]any{"org.apache.mesos": map[string]any{"network_info": map[string]any{
		"ip_addresses": []any{map[string]any{"protocol": "IPv4"}}, // its default, whatever the family
		"labels":       map[string]any{"labels": []any{map[string]any{"key": "app", "value": c.Short}}},
		"name":         c.Overlay,
	}}}
	return json.Marshal(conf)
}

// ucr runs the plugin as Mesos' isolator does: that very environment and nothing
// else, an id with a dot as nested containers have.
func (c *Container) ucr(ctx context.Context, verb string) ([]byte, error) {
	var conf struct{ Type string }
	if err := json.Unmarshal(c.stdin, &conf); err != nil {
		return nil, fmt.Errorf("%s: %s before a first ADD: %w", c.Name, verb, err)
	}
	h := c.Host
	cmd := h.Command(ctx, filepath.Join(h.Lab.Bin, conf.Type))
	cmd.Env = []string{
		"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + c.Name + ".task", "CNI_NETNS=" + c.Path,
		"CNI_IFNAME=eth0", "CNI_PATH=" + h.Lab.Bin, "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
	}
	cmd.Stdin = bytes.NewReader(c.stdin)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %s %s: %w: stdout='%s', stderr='%s'", c.Name, conf.Type, verb, err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.Bytes(), nil
}

func (c *Container) ucrAdd(ctx context.Context) (addrs []netip.Prefix, err error) {
	if c.stdin, err = c.ucrStdin(); err != nil {
		return nil, err
	}
	out, err := c.ucr(ctx, "ADD")
	if err != nil {
		return nil, err
	}
	if addrs, err = parseUCR(out); err != nil {
		return nil, fmt.Errorf("%s: Mesos would refuse the result: %w: %s", c.Name, err, out)
	}
	return addrs, nil
}

// parseUCR reads a result as strictly as the isolator: one JSON object, in which
// it knows ip4, ip6 and dns. ip4.ip must be in CIDR form.
func parseUCR(out []byte) ([]netip.Prefix, error) {
	type ipConfig struct {
		IP      *string
		Gateway string
		Routes  []struct {
			Dst *string
			GW  string
		}
	}
	var r struct {
		IP4, IP6 *ipConfig
		DNS      struct {
			Nameservers, Search, Options []string
			Domain                       string
		}
	}
	if !strings.HasPrefix(strings.TrimSpace(string(out)), "{") {
		return nil, errors.New("not a JSON object")
	}
	if err := json.Unmarshal(out, &r); err != nil { // refuses a second document
		return nil, err
	}
	var addrs []netip.Prefix
	for i, c := range []*ipConfig{r.IP4, r.IP6} {
		name := []string{"ip4", "ip6"}[i]
		if c == nil {
			continue
		}
		if c.IP == nil {
			return nil, fmt.Errorf("%s has no ip", name)
		}
		p, err := netip.ParsePrefix(*c.IP)
		if err != nil || p.Addr().Is4() != (name == "ip4") {
			return nil, fmt.Errorf("%s.ip %q: want an address of that family in CIDR form", name, *c.IP)
		}
		for _, route := range c.Routes {
			if route.Dst == nil {
				return nil, fmt.Errorf("%s has a route without dst", name)
			}
		}
		addrs = append(addrs, p)
	}
	if len(addrs) == 0 {
		return nil, errors.New("neither ip4 nor ip6")
	}
	return addrs, nil
}
