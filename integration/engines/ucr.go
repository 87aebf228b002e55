package engines

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

// UCR calls CNI plugins exactly as the network/cni isolator of the Mesos agent
// does: its check of the configuration directory, its environment, its
// standard input, its parser for the result, its order of events. Mesos itself
// cannot be built on a small machine; this is written after its source
// (apache/mesos at c1b42f79d, src/slave/containerizer/mesos/isolators/network/cni).
type UCR struct {
	Host       *Host
	ConfDir    string // --network_cni_config_dir
	PluginsDir string // --network_cni_plugins_dir, colon separated
}

// ucrRoot is where the isolator keeps its namespaces and checkpoints.
const ucrRoot = "/run/mesos/isolators/network/cni"

// Name implements Engine.
func (u *UCR) Name() string { return "Mesos UCR (its isolator, replayed)" }

// Version implements Engine.
func (u *UCR) Version(context.Context) (string, error) { return "c1b42f79d", nil }

// Start implements Engine: it does what the Mesos agent does when it starts,
// and complains about what that would skip with an error in its log.
func (u *UCR) Start(context.Context) error {
	_, err := u.Networks()
	return err
}

// Networks reads the configuration directory: every regular file in it, what-
// ever its name. It returns the network files by network, and an error for each
// that Mesos would not use.
func (u *UCR) Networks() (map[string]string, error) {
	entries, err := os.ReadDir(u.Host.File(u.ConfDir))
	if err != nil {
		return nil, err
	}
	files := map[string]string{}
	var errs []error
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		file := filepath.Join(u.ConfDir, e.Name())
		name, err := u.checkFile(file)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", file, err))
		case files[name] != "":
			errs = append(errs, fmt.Errorf("%s: network %q is defined by %s already", file, name, files[name]))
		default:
			files[name] = file
		}
	}
	return files, errors.Join(errs...)
}

func (u *UCR) checkFile(file string) (network string, err error) {
	b, err := os.ReadFile(u.Host.File(file))
	if err != nil {
		return "", err
	}
	var conf struct {
		Name, Type *string
		IPAM       *struct{ Type *string }
	}
	if err := json.Unmarshal(b, &conf); err != nil {
		return "", err
	}
	if conf.Name == nil || conf.Type == nil {
		return "", errors.New("name and type are required at the top")
	}
	if _, err := u.plugin(*conf.Type); err != nil {
		return "", err
	}
	if conf.IPAM != nil {
		if conf.IPAM.Type == nil {
			return "", errors.New("ipam without a type")
		}
		if _, err := u.plugin(*conf.IPAM.Type); err != nil {
			return "", err
		}
	}
	return *conf.Name, nil
}

// plugin finds a plugin that anybody may execute.
func (u *UCR) plugin(name string) (string, error) {
	for _, dir := range strings.Split(u.PluginsDir, ":") {
		file := filepath.Join(dir, name)
		if fi, err := os.Stat(u.Host.File(file)); err == nil && fi.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("plugin %q is not in %s", name, u.PluginsDir)
}

// ucrContainer is what the isolator keeps of one.
type ucrContainer struct {
	u       *UCR
	id      string
	network string
	stdin   []byte // network.conf: what DEL gets too
	plugin  string
}

func (c *ucrContainer) dir() string   { return filepath.Join(ucrRoot, c.id) }
func (c *ucrContainer) netns() string { return filepath.Join(c.dir(), "ns") }

// Run implements Engine.
func (u *UCR) Run(ctx context.Context, s Spec) (*Container, error) {
	c := &ucrContainer{u: u, id: newUUID(), network: s.Network}
	if err := c.isolate(ctx); err != nil {
		return nil, err
	}
	k := &Container{Name: s.Name, ID: c.id, Netns: c.netns()}
	k.exec = func(ctx context.Context, args ...string) (string, error) {
		// Busybox alone, as in the images of the other engines.
		return u.Host.Exec(ctx, append([]string{"nsenter", "--net=" + c.netns(), "busybox"}, args...)...)
	}
	var server *Daemon
	k.remove = func(ctx context.Context) error {
		var errs []error
		if server != nil {
			errs = append(errs, server.Stop())
		}
		return errors.Join(append(errs, c.Destroy(ctx))...)
	}
	ips, err := c.attach(ctx, s)
	if err != nil {
		return k, errors.Join(err, c.Destroy(ctx))
	}
	k.IPs = ips
	page := filepath.Join(c.dir(), "www")
	if err := u.Host.Write(filepath.Join(page, "index.html"), s.Name+"\n"); err != nil {
		return k, err
	}
	server, err = u.Host.Start("ucr-"+s.Name, "nsenter", "--net="+c.netns(), "busybox", "httpd", "-f", "-p", "80", "-h", page)
	return k, err
}

// isolate makes the container's network namespace. Mesos brings lo up itself.
func (c *ucrContainer) isolate(ctx context.Context) error {
	_, err := c.u.Host.Exec(ctx, "sh", "-ec", `
		mkdir -p "$1"
		touch "$1/ns"
		unshare --net="$1/ns" ip link set lo up`, "sh", c.dir())
	return err
}

func (c *ucrContainer) attach(ctx context.Context, s Spec) ([]netip.Addr, error) {
	networks, err := c.u.Networks()
	file, ok := networks[s.Network]
	if !ok {
		return nil, errors.Join(fmt.Errorf("unknown CNI network %q", s.Network), err)
	}
	if err := c.configure(file, s); err != nil {
		return nil, err
	}
	out, err := c.call(ctx, "ADD", true)
	if err != nil {
		return nil, fmt.Errorf("the CNI plugin %q failed to attach container %s to CNI network %q: %w", c.plugin, c.id, s.Network, err)
	}
	ips, err := parseUCRResult(out)
	if err != nil {
		return nil, fmt.Errorf("result of %s: %w: %s", c.plugin, err, out)
	}
	return ips, c.u.Host.Write(filepath.Join(c.dir(), s.Network, "eth0", "network.info"), string(out))
}

// configure makes the plugin's standard input of the network file: the same
// object with its keys sorted, and what the framework asked for under args.
func (c *ucrContainer) configure(file string, s Spec) error {
	b, err := os.ReadFile(c.u.Host.File(file))
	if err != nil {
		return err
	}
	var conf map[string]any
	if err := json.Unmarshal(b, &conf); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	args, _ := conf["args"].(map[string]any)
	if args == nil {
		args = map[string]any{}
	}
	const ours = "org.apache.mesos"
	if _, ok := args[ours]; ok {
		return fmt.Errorf("%s: sets args.%q, which is for Mesos to set", file, ours)
	}
	info := map[string]any{"name": s.Network, "ip_addresses": []any{map[string]any{"protocol": "IPv4"}}}
	if len(s.Ports) > 0 {
		mappings, err := portMappings(s.Ports)
		if err != nil {
			return err
		}
		info["port_mappings"] = mappings
	}
	args[ours] = map[string]any{"network_info": info}
	conf["args"] = args
	if c.stdin, err = json.Marshal(conf); err != nil {
		return err
	}
	plugin, _ := conf["type"].(string)
	if c.plugin, err = c.u.plugin(plugin); err != nil {
		return err
	}
	return c.u.Host.Write(filepath.Join(c.dir(), s.Network, "network.conf"), string(c.stdin))
}

func portMappings(ports []string) ([]any, error) {
	var mappings []any
	for _, p := range ports {
		var host, container int
		if _, err := fmt.Sscanf(p, "%d:%d", &host, &container); err != nil {
			return nil, fmt.Errorf("port %q: want HOST:CONTAINER", p)
		}
		mappings = append(mappings, map[string]any{"host_port": host, "container_port": container, "protocol": "tcp"})
	}
	return mappings, nil
}

// call executes the plugin with the isolator's environment and nothing else.
func (c *ucrContainer) call(ctx context.Context, verb string, netns bool) ([]byte, error) {
	cmd := c.u.Host.Command(ctx, c.plugin)
	cmd.Env = []string{
		"CNI_COMMAND=" + verb,
		"CNI_CONTAINERID=" + c.id,
		"CNI_PATH=" + c.u.PluginsDir,
		"CNI_IFNAME=eth0",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	}
	if netns {
		cmd.Env = append(cmd.Env, "CNI_NETNS="+c.netns())
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(c.stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%w: stdout='%s', stderr='%s'", err, stdout.String(), stderr.String())
	}
	return stdout.Bytes(), nil
}

// Destroy detaches the container and removes its namespace, in Mesos' order,
// and then as after an agent's restart: once more, without the namespace. DEL
// that fails keeps everything, as in Mesos.
func (c *ucrContainer) Destroy(ctx context.Context) error {
	if c.stdin != nil { // else it was never configured, and Mesos skips DEL
		if _, err := c.call(ctx, "DEL", true); err != nil {
			return fmt.Errorf("the CNI plugin %q failed to detach container %s: %w", c.plugin, c.id, err)
		}
	}
	if _, err := c.u.Host.Exec(ctx, "umount", c.netns()); err != nil {
		return err
	}
	if c.stdin != nil {
		if _, err := c.call(ctx, "DEL", false); err != nil {
			return fmt.Errorf("the CNI plugin %q failed to detach container %s without its namespace: %w", c.plugin, c.id, err)
		}
	}
	_, err := c.u.Host.Exec(ctx, "rm", "-r", c.dir())
	return err
}

// parseUCRResult reads what a plugin printed as the isolator does: exactly one
// JSON object, of which ip4, ip6 and dns count; anything else in it is ignored, and
// of these nothing may have another type.
func parseUCRResult(out []byte) ([]netip.Addr, error) {
	type ipConfig struct {
		IP      *string
		Gateway *string
		Routes  []struct {
			Dst *string
			GW  *string
		}
	}
	var info struct {
		IP4, IP6 *ipConfig
		DNS      *struct {
			Nameservers, Search, Options []string
			Domain                       *string
		}
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return nil, err
	}
	var ips []netip.Addr
	for _, ip := range []*ipConfig{info.IP4, info.IP6} {
		if ip == nil {
			continue
		}
		if ip.IP == nil {
			return nil, errors.New("ip4 or ip6 without ip")
		}
		for _, r := range ip.Routes {
			if r.Dst == nil {
				return nil, errors.New("route without dst")
			}
		}
		p, err := netip.ParsePrefix(*ip.IP)
		if err != nil {
			return nil, err
		}
		ips = append(ips, p.Addr())
	}
	if info.IP4 != nil && !ips[0].Is4() {
		return nil, fmt.Errorf("ip4 has the address %s", ips[0])
	}
	if len(ips) == 0 {
		// Mesos takes it, and then the task has no address: nobody wants that.
		return nil, errors.New("neither ip4 nor ip6")
	}
	return ips, nil
}
