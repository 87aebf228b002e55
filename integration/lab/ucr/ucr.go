// Package ucr calls CNI plugins exactly as the network/cni isolator of the Mesos
// agent does: its checks of the configuration directory, its environment, its
// standard input, its parser for results, its checkpoints, its order of events.
// It is written after the isolator's source (apache/mesos,
// src/slave/containerizer/mesos/isolators/network/cni), because Mesos itself
// takes hours to build.
package ucr

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// DefaultPath is the PATH of a Mesos agent that has none.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Isolator is the isolator of one agent. The directories are as the agent sees
// them.
type Isolator struct {
	ConfDir    string // --network_cni_config_dir
	PluginsDir string // --network_cni_plugins_dir, colon separated
	Root       string // <runtime_dir>/isolators/network/cni
	Path       string // the agent's PATH; empty: DefaultPath

	// Command makes a program that will run where the agent runs.
	Command func(ctx context.Context, argv ...string) *exec.Cmd
	// File is where this process finds a file of the agent's; nil: at its own path.
	File func(path string) string
}

func (i *Isolator) file(elem ...string) string {
	path := filepath.Join(elem...)
	if i.File == nil {
		return path
	}
	return i.File(path)
}

// NetworkInfo is one of a container's network_infos.
type NetworkInfo struct {
	Name         string        // of the CNI network; without one the info is skipped
	Addresses    []string      // static requests; "": any address
	Labels       [][2]string   // key, value
	PortMappings []PortMapping //
}

// PortMapping is one of its port_mappings.
type PortMapping struct {
	HostPort, ContainerPort int
	Protocol                string // empty: not given
}

// json is how protobuf prints the message.
func (n NetworkInfo) json() map[string]any {
	out := map[string]any{"name": n.Name}
	addresses := n.Addresses
	if len(addresses) == 0 {
		addresses = []string{""}
	}
	var ips []any
	for _, a := range addresses {
		ip := map[string]any{"protocol": "IPv4"} // the default is printed, whatever the family
		if a != "" {
			ip["ip_address"] = a
		}
		ips = append(ips, ip)
	}
	out["ip_addresses"] = ips
	if n.Labels != nil {
		var labels []any
		for _, l := range n.Labels {
			labels = append(labels, map[string]any{"key": l[0], "value": l[1]})
		}
		out["labels"] = map[string]any{"labels": labels}
	}
	var mappings []any
	for _, m := range n.PortMappings {
		mapping := map[string]any{"host_port": m.HostPort, "container_port": m.ContainerPort}
		if m.Protocol != "" {
			mapping["protocol"] = m.Protocol
		}
		mappings = append(mappings, mapping)
	}
	if mappings != nil {
		out["port_mappings"] = mappings
	}
	return out
}

// Networks does the checks of the agent's start: every regular file of the
// configuration directory, whatever its name. It returns the files by network
// and an error for each file that Mesos would log and skip.
func (i *Isolator) Networks() (files map[string]string, skipped []error, err error) {
	entries, err := os.ReadDir(i.file(i.ConfDir))
	if err != nil {
		return nil, nil, fmt.Errorf("the agent would not start: %w", err)
	}
	files = map[string]string{}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		file := filepath.Join(i.ConfDir, e.Name())
		name, err := i.checkFile(file)
		if err == nil && files[name] != "" {
			err = fmt.Errorf("network %q is defined by %s already", name, files[name])
		}
		if err != nil {
			skipped = append(skipped, fmt.Errorf("%s: %w", file, err))
			continue
		}
		files[name] = file
	}
	return files, skipped, nil
}

func (i *Isolator) checkFile(file string) (network string, err error) {
	conf, err := i.readObject(file)
	if err != nil {
		return "", err
	}
	p := parser{}
	network, plugin := p.requiredString(conf, "name"), p.requiredString(conf, "type")
	ipam, hasIPAM := p.object(conf, "ipam")
	ipamType := ""
	if hasIPAM {
		ipamType = p.requiredString(ipam, "type")
		p.routes(ipam)
	}
	p.dns(conf)
	if p.err != nil {
		return "", p.err
	}
	if _, err := i.Plugin(plugin); err != nil {
		return "", err
	}
	if hasIPAM {
		_, err = i.Plugin(ipamType)
	}
	return network, err
}

func (i *Isolator) readObject(file string) (map[string]any, error) {
	b, err := os.ReadFile(i.file(file))
	if err != nil {
		return nil, err
	}
	return parseObject(b)
}

// Plugin finds a plugin: of that name, and somebody may execute it.
func (i *Isolator) Plugin(name string) (string, error) {
	for _, dir := range strings.Split(i.PluginsDir, ":") {
		file := filepath.Join(dir, name)
		if fi, err := os.Stat(i.file(file)); err == nil && fi.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("plugin %q is not in %s", name, i.PluginsDir)
}

// Handle is the container's namespace as plugins get to see it.
func (i *Isolator) Handle(id string) string { return filepath.Join(i.Root, id, "ns") }

// Isolate binds a network namespace (a path of the agent's) to the container's
// handle.
func (i *Isolator) Isolate(ctx context.Context, id, netns string) error {
	if err := os.MkdirAll(i.file(i.Root, id), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(i.file(i.Handle(id)), nil, 0o644); err != nil {
		return err
	}
	return i.run(ctx, "mount", "--bind", netns, i.Handle(id))
}

func (i *Isolator) run(ctx context.Context, argv ...string) error {
	if out, err := i.Command(ctx, argv...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
	}
	return nil
}

// Attach attaches a container to all its networks at the same time. The results
// are in the order of the infos that have a name. When one fails, Mesos destroys
// the container: the caller is to call Detach.
func (i *Isolator) Attach(ctx context.Context, id string, infos ...NetworkInfo) ([]Result, error) {
	files, _, err := i.Networks()
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var named []NetworkInfo
	for _, info := range infos {
		switch {
		case info.Name == "":
			continue
		case seen[info.Name]:
			return nil, fmt.Errorf("attempted to join CNI network %q multiple times", info.Name)
		case files[info.Name] == "":
			return nil, fmt.Errorf("unknown CNI network %q", info.Name)
		}
		seen[info.Name] = true
		named = append(named, info)
	}
	results, errs := make([]Result, len(named)), make([]error, len(named))
	var wg sync.WaitGroup
	for n, info := range named {
		wg.Go(func() { results[n], errs[n] = i.attach(ctx, id, fmt.Sprintf("eth%d", n), files[info.Name], info) })
	}
	wg.Wait()
	return results, errors.Join(errs...)
}

func (i *Isolator) attach(ctx context.Context, id, ifName, file string, info NetworkInfo) (Result, error) {
	conf, err := i.readObject(file)
	if err != nil {
		return Result{}, err
	}
	stdin, err := Stdin(conf, info)
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", file, err)
	}
	dir := i.file(i.Root, id, info.Name)
	if err := os.MkdirAll(filepath.Join(dir, ifName), 0o755); err != nil {
		return Result{}, err
	}
	if err := os.WriteFile(filepath.Join(dir, "network.conf"), stdin, 0o644); err != nil {
		return Result{}, err
	}
	out, err := i.call(ctx, "ADD", id, info.Name, ifName)
	if err != nil {
		return Result{}, err
	}
	r, err := ParseResult(out)
	if err != nil {
		return Result{}, fmt.Errorf("failed to parse the output of the CNI plugin: %w: %s", err, out)
	}
	return r, os.WriteFile(filepath.Join(dir, ifName, "network.info"), out, 0o644)
}

// Stdin is what a plugin is given: the network's file, its keys sorted, and what
// the framework asked for under args.
func Stdin(conf map[string]any, info NetworkInfo) ([]byte, error) {
	const ours = "org.apache.mesos"
	args := map[string]any{}
	if there, ok := conf["args"].(map[string]any); ok {
		for k, v := range there {
			args[k] = v
		}
	}
	if _, ok := args[ours]; ok {
		return nil, fmt.Errorf("sets args.%q, which is Mesos' to set", ours)
	}
	args[ours] = map[string]any{"network_info": info.json()}
	out := map[string]any{}
	for k, v := range conf {
		out[k] = v
	}
	out["args"] = args
	return json.Marshal(out)
}

// call executes the plugin with the isolator's environment and nothing else. DEL
// is told the namespace only as long as the handle is one.
func (i *Isolator) call(ctx context.Context, verb, id, network, ifName string) ([]byte, error) {
	checkpoint := filepath.Join(i.Root, id, network, "network.conf")
	conf, err := i.readObject(checkpoint)
	if err != nil {
		return nil, err
	}
	name, _ := conf["type"].(string)
	plugin, err := i.Plugin(name)
	if err != nil {
		return nil, err
	}
	stdin, err := os.Open(i.file(checkpoint))
	if err != nil {
		return nil, err
	}
	defer stdin.Close()
	path := i.Path
	if path == "" {
		path = DefaultPath
	}
	cmd := i.Command(ctx, plugin)
	cmd.Env = []string{
		"CNI_COMMAND=" + verb,
		"CNI_CONTAINERID=" + id,
		"CNI_PATH=" + i.PluginsDir,
		"CNI_IFNAME=" + ifName,
		"PATH=" + path,
	}
	if verb == "ADD" || i.run(ctx, "nsenter", "--net="+i.Handle(id), "true") == nil {
		cmd.Env = append(cmd.Env, "CNI_NETNS="+i.Handle(id))
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		what := "attach container " + id + " to"
		if verb == "DEL" {
			what = "detach container " + id + " from"
		}
		return nil, fmt.Errorf("the CNI plugin '%s' failed to %s CNI network '%s': stdout='%s', stderr='%s' (%w)", plugin, what, network, stdout.String(), stderr.String(), err)
	}
	return stdout.Bytes(), nil
}

// Detach runs DEL for every network whose network.conf was written, then takes
// the handle and the checkpoints away. If a DEL fails, everything stays.
func (i *Isolator) Detach(ctx context.Context, id string) error {
	if err := i.Del(ctx, id); err != nil {
		return err
	}
	if err := i.Forget(ctx, id); err != nil {
		return err
	}
	return os.RemoveAll(i.file(i.Root, id))
}

// Del only runs the DELs, all at the same time.
func (i *Isolator) Del(ctx context.Context, id string) error {
	confs, err := filepath.Glob(i.file(i.Root, id, "*", "network.conf"))
	if err != nil {
		return err
	}
	errs := make([]error, len(confs))
	var wg sync.WaitGroup
	for n, conf := range confs {
		wg.Go(func() { errs[n] = i.del(ctx, id, filepath.Dir(conf)) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (i *Isolator) del(ctx context.Context, id, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if _, err := i.call(ctx, "DEL", id, filepath.Base(dir), e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// Forget takes the handle away, as the end of the agent's machine or a clean-up
// does; DEL will have no namespace.
func (i *Isolator) Forget(ctx context.Context, id string) error {
	if i.run(ctx, "nsenter", "--net="+i.Handle(id), "true") != nil {
		return nil
	}
	return i.run(ctx, "umount", i.Handle(id))
}

// Recover reads what Attach has stored, as the agent does when it starts again.
// A result that cannot be parsed any more keeps it from starting.
func (i *Isolator) Recover(id string) (map[string]Result, error) {
	infos, err := filepath.Glob(i.file(i.Root, id, "*", "*", "network.info"))
	if err != nil {
		return nil, err
	}
	out := map[string]Result{}
	for _, info := range infos {
		b, err := os.ReadFile(info)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		r, err := ParseResult(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", info, err)
		}
		out[filepath.Base(filepath.Dir(info))] = r
	}
	return out, nil
}
