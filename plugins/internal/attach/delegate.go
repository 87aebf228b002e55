package attach

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/conntrack"
	"overlayd.internal/overlay/internal/veth"
	"overlayd.internal/overlay/ipam"
)

// The plugins of others that we run. containernetworking's own package for this
// is not used because it links net/http, through tracing, which costs every
// start of the program.

const (
	// maxOutput is the most that is read of what a plugin prints.
	maxOutput = 1 << 20
	// pipeDelay is how long a child that a plugin left behind may keep its
	// output open.
	pipeDelay = time.Second
)

// execPlugin runs another CNI plugin as the specification says: found through
// CNI_PATH, with the environment of the call, its stderr passed on. It returns
// what the plugin printed.
func execPlugin(ctx context.Context, c *cni.Call, plugin, command string, stdin []byte) ([]byte, error) {
	path, err := findPlugin(plugin, c.Path)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = append(os.Environ(), environment(c, command)...) // the last one counts
	cmd.Env = append(cmd.Env, callerVariable+"="+caller(c))
	cmd.Stdin = bytes.NewReader(stdin)
	var printed bytes.Buffer
	stdout := &limited{&printed, maxOutput}
	cmd.Stdout = stdout
	cmd.Stderr = &limited{c.Stderr, maxOutput}
	cmd.WaitDelay = pipeDelay
	err = cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		// The plugin itself was successful and left somebody behind who has its
		// output open. What it printed before it ended has arrived.
		err = nil
	}
	switch {
	case ctx.Err() != nil:
		return nil, cni.Errorf(types.ErrTryAgainLater, "plugin %s did not finish %s in time and was stopped", plugin, command)
	case err != nil:
		return nil, pluginError(plugin, command, printed.Bytes(), err)
	case stdout.left < 0:
		return nil, cni.Errorf(cni.ErrCodeDelegate, "plugin %s printed more than %d bytes on %s", plugin, maxOutput, command)
	}
	return printed.Bytes(), nil
}

// callerVariable tells a program of ours that one of ours is behind its call, and
// for which network and attachment.
const callerVariable = "OVERLAY_CNI_CALLER"

func caller(c *cni.Call) string {
	return strings.Join([]string{c.Conf.Name, c.ContainerID, c.IfName}, "/")
}

// mainPlugins are plugins that make interfaces or come after one that does. As IPAM
// plugin they would run the configuration's IPAM plugin: themselves.
var mainPlugins = []string{
	"m-overlay", "d-overlay", "overlay-netavark", "bridge", "ptp", "macvlan", "ipvlan", "vlan", "host-device", "loopback", "dummy", "tap",
	"portmap", "tuning", "firewall", "bandwidth", "sbr", "vrf",
}

// checkDelegate refuses a configuration whose IPAM plugin is none, or leads back to
// this program by whatever name.
func checkDelegate(c *cni.Call) error {
	if slices.Contains(mainPlugins, c.Conf.IPAM.Type) {
		return cni.Errorf(types.ErrInvalidNetworkConfig, "configuration: ipam.type: %s is no IPAM plugin; leave ipam out for addresses of the overlay", c.Conf.IPAM.Type)
	}
	if isLoop(c) {
		return cni.Errorf(types.ErrInvalidNetworkConfig, "configuration: ipam.type: plugin %s leads back to the plugin that runs it; leave ipam out for addresses of the overlay", c.Conf.IPAM.Type)
	}
	return nil
}

// isLoop reports whether this call comes, through other plugins, from one of ours
// for the same attachment.
func isLoop(c *cni.Call) bool { return delegates(c.Conf) && os.Getenv(callerVariable) == caller(c) }

// environment is what the call is about, as another plugin is told it. Nothing of
// it is in our own environment where the runtime does not speak CNI.
func environment(c *cni.Call, command string) []string {
	env := []string{"CNI_COMMAND=" + command}
	for _, v := range [...]struct{ name, value string }{
		{"CNI_CONTAINERID", c.ContainerID}, {"CNI_NETNS", c.NetNS}, {"CNI_IFNAME", c.IfName},
		{"CNI_PATH", strings.Join(c.Path, string(os.PathListSeparator))},
	} {
		if v.value != "" {
			env = append(env, v.name+"="+v.value)
		}
	}
	return env
}

// missingPlugin is the error of a plugin that is not installed.
type missingPlugin struct{ err *types.Error }

func (m *missingPlugin) Error() string { return m.err.Error() }
func (m *missingPlugin) Unwrap() error { return m.err }

// findPlugin looks through CNI_PATH for a file of that name.
func findPlugin(plugin string, path []string) (string, error) {
	if plugin == "" || plugin == "." || plugin == ".." || strings.ContainsRune(plugin, '/') {
		return "", cni.Errorf(types.ErrInvalidNetworkConfig, "plugin %q: must be the name of a program in CNI_PATH", plugin)
	}
	for _, dir := range path {
		file := filepath.Join(dir, plugin)
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() {
			return file, nil
		}
	}
	return "", &missingPlugin{cni.Errorf(cni.ErrCodeDelegate,
		"plugin %s is in none of the directories of CNI_PATH (%s); install it, for example from containernetworking-plugins", plugin, strings.Join(path, ":"))}
}

// pluginError keeps the code of the specification that a plugin gave, and its
// words.
func pluginError(plugin, command string, stdout []byte, err error) error {
	var said types.Error
	if json.Unmarshal(stdout, &said) != nil || said.Msg == "" {
		text := strings.TrimSpace(string(stdout[:min(len(stdout), 1000)]))
		if text == "" {
			text = "it said nothing on stdout"
		}
		return cni.Errorf(cni.ErrCodeDelegate, "plugin %s: %s: %v: %s", plugin, command, err, text)
	}
	code := said.Code
	if code == 0 || code >= 100 { // its own codes mean nothing here
		code = cni.ErrCodeDelegate
	}
	e := cni.Errorf(code, "plugin %s: %s: %s", plugin, command, said.Msg)
	e.Details = said.Details
	return e
}

// limited keeps, or passes on, so many bytes and drops the rest, so that the
// writer never blocks.
type limited struct {
	to   io.Writer
	left int // negative: so many bytes were dropped
}

func (l *limited) Write(b []byte) (int, error) {
	if l.left > 0 {
		// A log that cannot be written is no reason to stop the plugin.
		_, _ = l.to.Write(b[:min(len(b), l.left)])
	}
	l.left -= len(b)
	return len(b), nil
}

// addressByPlugin reserves addresses through an IPAM plugin of others.
func (a *attaching) addressByPlugin(ctx context.Context) (addressing, error) {
	c := a.call
	// From here on: its ADD may have reserved something even if it fails.
	a.undo.push(func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		return delegateDel(ctx, c)
	})
	out, err := execPlugin(ctx, c, c.Conf.IPAM.Type, "ADD", c.Stdin)
	if err != nil {
		return addressing{}, err
	}
	r, err := cni.ParseResult(out, c.Conf.CNIVersion)
	if err != nil {
		return addressing{}, cni.Errorf(cni.ErrCodeDelegate, "plugin %s: result of ADD: %v", c.Conf.IPAM.Type, err)
	}
	got, err := a.accept(r)
	if err == nil {
		err = a.reserve(ctx, got.plain())
	}
	if err != nil && !errors.As(err, new(*types.Error)) {
		err = cni.Errorf(cni.ErrCodeDelegate, "plugin %s: %v", c.Conf.IPAM.Type, err)
	}
	return got, err
}

// reserve files addresses that an IPAM plugin of others has chosen, so that nobody
// else gets them: it knows nothing of our store, of other plugins' books and of
// Docker. An address that is in use is refused; that of a host end that is not
// filed is too.
func (a *attaching) reserve(ctx context.Context, addrs []netip.Addr) error {
	links, err := veth.List()
	if err != nil {
		return kernelError(err)
	}
	for _, l := range links {
		for _, addr := range addrs {
			if l.Overlay == a.overlay.Info.Name && l.Key() != a.att.Key() && slices.Contains(l.Addrs, addr) {
				return fmt.Errorf("gave %s, which is in use by %s", addr, l.Attachment)
			}
		}
	}
	store, err := cni.OpenStore(ctx, a.call, a.state.CoolingSeconds)
	if err != nil {
		return err
	}
	request := a.request
	request.Want, request.Exact = addrs, true
	got, err := store.Allocate(ctx, request)
	store.Close()
	var unavailable *ipam.UnavailableError
	if errors.As(err, &unavailable) {
		return fmt.Errorf("gave %s, which %s", unavailable.Addr, unavailable.Reason)
	}
	if err != nil {
		return cni.StoreError(err)
	}
	if !got.Existing {
		a.undo.push(a.release)
	}
	return kernelError(conntrack.Forget(got.Flush))
}

// accept takes over what an IPAM plugin gave. Other hosts send only the half's
// addresses here, so that it must be one of them.
func (a *attaching) accept(r *types100.Result) (addressing, error) {
	out := addressing{dns: r.DNS}
	for _, ip := range r.IPs {
		p, ok := prefixOf(ip.Address)
		if !ok {
			return out, fmt.Errorf("gave %s, which is no address", ip.Address.String())
		}
		half, err := a.usable(p.Addr())
		if err != nil {
			return out, err
		}
		for _, other := range out.addrs {
			if other.Addr().BitLen() == p.Addr().BitLen() {
				return out, fmt.Errorf("gave %s and %s; one address of each family, please", other, p)
			}
		}
		gateway := addrOf(ip.Gateway)
		if !gateway.IsValid() && p.Contains(conf.Gateway(half)) {
			gateway = conf.Gateway(half)
		}
		out.addrs = append(out.addrs, p)
		out.gateways = append(out.gateways, gateway)
	}
	if len(out.addrs) == 0 {
		return out, errors.New("gave no address")
	}
	return out, out.takeRoutes(r)
}

// usable returns the half's range that the address is in, if a container may
// have it.
func (a *attaching) usable(ip netip.Addr) (netip.Prefix, error) {
	for _, half := range a.ranges {
		if !half.Contains(ip) {
			continue
		}
		if ip.Less(conf.FirstContainer(half)) || conf.LastContainer(half).Less(ip) {
			return half, fmt.Errorf("gave %s, which is the network, gateway or broadcast address of %s", ip, half)
		}
		return half, nil
	}
	return netip.Prefix{}, fmt.Errorf("gave %s, which is outside the %s half of overlay %s on this host %v", ip, a.half, a.overlay.Info.Name, a.ranges)
}

// takeRoutes takes over the plugin's routes.
func (in *addressing) takeRoutes(r *types100.Result) error {
	for _, given := range r.Routes {
		dst, ok := prefixOf(given.Dst)
		if !ok {
			return fmt.Errorf("gave a route to %s, which is no network", given.Dst.String())
		}
		in.routes = append(in.routes, route{dst: dst.Masked(), gw: addrOf(given.GW)})
	}
	in.completeRoutes()
	return nil
}

// completeRoutes gives routes without a gateway that of their family, and a family
// without routes a default route.
func (in *addressing) completeRoutes() {
	for i, p := range in.addrs {
		gateway, routed := in.gateways[i], false
		for j, r := range in.routes {
			if r.dst.Addr().BitLen() == p.Addr().BitLen() {
				routed = true
				if !r.gw.IsValid() {
					in.routes[j].gw = gateway
				}
			}
		}
		if !routed && gateway.IsValid() {
			in.routes = append(in.routes, defaultVia(gateway))
		}
	}
}

// delegateDel runs DEL of the configured IPAM plugin. One that ADD refuses has
// reserved nothing.
func delegateDel(ctx context.Context, c *cni.Call) error {
	if checkDelegate(c) != nil {
		return nil
	}
	_, err := execPlugin(ctx, c, c.Conf.IPAM.Type, "DEL", c.Stdin)
	return err
}

// delegateVerb runs CHECK, GC or STATUS of the configured IPAM plugin.
func delegateVerb(ctx context.Context, c *cni.Call) error {
	_, err := execPlugin(ctx, c, c.Conf.IPAM.Type, c.Command, c.Stdin)
	return err
}
