// Package runtimes keeps the files through which container runtimes find the
// overlays of this host: one CNI configuration list per overlay for containerd,
// Podman, Nomad and their kin, and one single-plugin file for Mesos' UCR.
//
// It writes what is wanted, removes what is its own and no longer wanted, and
// leaves every other file in those directories alone. A file is its own when
// both the name and the first plugin in it are the ones it would write.
package runtimes

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// cniPrefix sorts our lists behind those of others: the CRI of containerd takes
// the first file in the directory for the default network of the host.
const cniPrefix = "87-"

// The CNI versions a list announces. containerd 1.6 and Podman 4.3 refuse a
// plain 1.1.0; newer runtimes find it in cniVersions.
const (
	baseVersion   = "1.0.0"
	statusVersion = "1.1.0"
)

const filePerm = 0o644

// maxFile is how large a file under one of our names may be. Ours have a few
// hundred bytes.
const maxFile = 1 << 20

// Files are the directories of one host. It may be used by one goroutine at a
// time.
type Files struct {
	CNIConfDir string   // for 87-<overlay>.conflist; empty: none are written
	UCRConfDir string   // for <overlay>.conf; empty: none are written
	RunDir     string   // where the agent publishes; absolute
	CNIBinDirs []string // where portmap is looked for, and plugins are asked for their versions
	Log        *slog.Logger

	versions map[string]answer // what the plugins said about VERSION, by path
}

// Sync makes the files match the overlays: one CNI list for each that has a
// Docker bridge, one UCR file for each that has a Mesos bridge. A file whose
// content is right is not touched. Failures do not stop the rest; they come
// back joined, and a later Sync tries again. A file of somebody else under a
// name we need is such a failure.
func (f *Files) Sync(ctx context.Context, overlays []conf.AgentOverlay) error {
	var errs []error
	for _, d := range f.directories() {
		want, err := render(overlays, d.half, func(name string) any { return d.content(ctx, name) })
		errs = append(errs, err, f.sync(d, want))
	}
	return errors.Join(errs...)
}

// Remove removes every file of ours.
func (f *Files) Remove() error {
	var errs []error
	for _, d := range f.directories() {
		if _, err := os.Stat(d.path); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		errs = append(errs, f.prune(d, nil))
	}
	return errors.Join(errs...)
}

// directories are those that files are kept in.
func (f *Files) directories() (out []directory) {
	if f.CNIConfDir != "" {
		out = append(out, directory{
			path: f.CNIConfDir, prefix: cniPrefix, suffix: ".conflist", firstPlugin: firstOfList, plugin: "d-overlay", half: conf.Docker,
			content: func(ctx context.Context, name string) any { return f.conflist(ctx, name) },
			write:   conf.WriteFiles, // the temporary name has no suffix that a CNI runtime looks for
		})
	}
	if f.UCRConfDir != "" {
		out = append(out, directory{
			path: f.UCRConfDir, suffix: ".conf", firstPlugin: onlyPlugin, plugin: "m-overlay", half: conf.Mesos, write: writeUCR,
			content: func(_ context.Context, name string) any { return f.ucr(name) },
		})
	}
	return out
}

// render returns the wanted content by overlay name for every overlay with a
// bridge of that half.
func render(overlays []conf.AgentOverlay, half conf.Half, content func(name string) any) (map[string][]byte, error) {
	want := map[string][]byte{}
	var errs []error
	for _, o := range overlays {
		if o.Bridge(half) == nil {
			continue
		}
		name := o.Info.Name
		if err := conf.CheckName(name); err != nil { // it becomes a file name
			errs = append(errs, fmt.Errorf("overlay name: %w", err))
			continue
		}
		b, err := json.MarshalIndent(content(name), "", "  ")
		if err != nil {
			errs = append(errs, fmt.Errorf("overlay %s: %w", name, err))
			continue
		}
		want[name] = append(b, '\n')
	}
	return want, errors.Join(errs...)
}

// plugin is one plugin's part of a configuration. The order of the fields is
// the order people read them in.
type plugin struct {
	Name         string          `json:"name,omitempty"` // single-plugin files only
	Type         string          `json:"type"`
	Overlay      string          `json:"overlay,omitempty"`
	RunDir       string          `json:"runDir,omitempty"`
	Capabilities map[string]bool `json:"capabilities,omitempty"`
	HostPorts    *bool           `json:"hostPorts,omitempty"`
	IPAM         *ipam           `json:"ipam,omitempty"`
}

type ipam struct {
	Type string `json:"type"`
}

type list struct {
	CNIVersion  string   `json:"cniVersion"`
	CNIVersions []string `json:"cniVersions,omitempty"`
	Name        string   `json:"name"`
	Plugins     []plugin `json:"plugins"`
}

// conflist is the chain for CNI runtimes: d-overlay, then portmap if the host has
// it. d-overlay is told the host ports, so that it knows whether there are any,
// but leaves them to portmap; and the rate, for the plugin bandwidth, which somebody may add.
func (f *Files) conflist(ctx context.Context, name string) list {
	l := list{CNIVersion: baseVersion, Name: name, Plugins: []plugin{{
		Type: "d-overlay", Overlay: name, RunDir: f.runDir(),
		Capabilities: map[string]bool{"ips": true, "mac": true, "portMappings": true, "bandwidth": true}, HostPorts: new(bool),
		IPAM: &ipam{Type: "overlay-ipam"},
	}}}
	if f.copies("portmap") != nil {
		l.Plugins = append(l.Plugins, plugin{Type: "portmap", Capabilities: map[string]bool{"portMappings": true}})
	}
	lacking := func(p plugin) bool { return !f.speaks(ctx, p.Type, statusVersion) }
	if !slices.ContainsFunc(l.Plugins, lacking) {
		l.CNIVersions = []string{baseVersion, statusVersion}
	}
	return l
}

// ucr is the one object UCR reads. It has no cniVersion: UCR understands
// only the oldest result, which is what a configuration without one asks for.
func (f *Files) ucr(name string) plugin {
	return plugin{Name: name, Type: "m-overlay", Overlay: name, RunDir: f.runDir(), IPAM: &ipam{Type: "overlay-ipam"}}
}

// runDir is empty when it need not be said.
func (f *Files) runDir() string {
	if f.RunDir == conf.DefaultRunDir {
		return ""
	}
	return f.RunDir
}

// directory is how files of ours look in one directory, and how they are
// written there.
type directory struct {
	path           string
	prefix, suffix string
	plugin         string // type of the first plugin of a file of ours
	firstPlugin    func([]byte) string
	half           conf.Half // whose bridge an overlay has to have
	content        func(ctx context.Context, overlay string) any
	write          func([]conf.File) []error
}

// overlay is the overlay a file name stands for, or "" for a name that is not ours.
func (d directory) overlay(file string) string {
	name, ok1 := strings.CutPrefix(file, d.prefix)
	name, ok2 := strings.CutSuffix(name, d.suffix)
	if !ok1 || !ok2 || conf.CheckName(name) != nil {
		return ""
	}
	return name
}

func (d directory) file(overlay string) string {
	return filepath.Join(d.path, d.prefix+overlay+d.suffix)
}

// ours reports whether the content is one we wrote.
func (d directory) ours(content []byte) bool { return d.firstPlugin(content) == d.plugin }

func firstOfList(b []byte) string {
	var l list
	if json.Unmarshal(b, &l) != nil || len(l.Plugins) == 0 {
		return ""
	}
	return l.Plugins[0].Type
}

func onlyPlugin(b []byte) string {
	var p plugin
	if json.Unmarshal(b, &p) != nil {
		return ""
	}
	return p.Type
}

func (f *Files) sync(d directory, want map[string][]byte) error {
	if err := os.MkdirAll(d.path, 0o755); err != nil {
		return fmt.Errorf("make the directory for runtime configurations: %w", err)
	}
	var errs []error
	var lacking []conf.File
	for _, name := range slices.Sorted(maps.Keys(want)) { // in order: the errors are logged when they change
		file := conf.File{Path: d.file(name), Data: want[name], Perm: filePerm}
		right, err := d.isRight(file)
		if err == nil && !right {
			lacking = append(lacking, file)
		}
		errs = append(errs, err)
	}
	for i, err := range d.write(lacking) {
		if err == nil {
			f.Log.Info("runtime configuration written", logkey.Path, lacking[i].Path)
		}
		errs = append(errs, err)
	}
	return errors.Join(append(errs, f.prune(d, want))...)
}

// prune removes the files of ours that are not wanted.
func (f *Files) prune(d directory, want map[string][]byte) error {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return fmt.Errorf("look for runtime configurations: %w", err)
	}
	var errs []error
	for _, e := range entries {
		name := d.overlay(e.Name())
		if _, wanted := want[name]; name == "" || wanted || !e.Type().IsRegular() {
			continue
		}
		errs = append(errs, f.remove(d, d.file(name)))
	}
	return errors.Join(errs...)
}

// isRight reports whether a file is as it should be. One of somebody else is an
// error.
func (d directory) isRight(file conf.File) (bool, error) {
	old, err := conf.ReadRegular(file.Path, maxFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read runtime configuration: %w", err)
	case bytes.Equal(old, file.Data):
		return true, nil
	case !d.ours(old):
		return false, fmt.Errorf("%s was not written by this agent (its first plugin is not %s) and stays as it is; move it away so that the overlay can be used", file.Path, d.plugin)
	}
	return false, nil
}

// remove deletes a file of ours that is no longer wanted.
func (f *Files) remove(d directory, path string) error {
	old, err := conf.ReadRegular(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !d.ours(old) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read runtime configuration: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove runtime configuration: %w", err)
	}
	f.Log.Info("runtime configuration removed", logkey.Path, path)
	return nil
}

// writeUCR writes files for Mesos, which tries every regular file in the
// directory whatever its name, so that a temporary one must not lie there. It
// goes beside the directory, or, where that is another file system (the
// directory is a mount point) or must not be written to, in a subdirectory,
// which Mesos passes over.
func writeUCR(files []conf.File) []error {
	for i := range files {
		files[i].TmpDir = filepath.Dir(filepath.Dir(files[i].Path))
	}
	errs := conf.WriteFiles(files)
	var again []int
	for i, err := range errs {
		if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) {
			again = append(again, i)
		}
	}
	if len(again) == 0 {
		return errs
	}
	tmp := filepath.Join(filepath.Dir(files[again[0]].Path), ".overlay-tmp")
	if err := os.Mkdir(tmp, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		for _, i := range again {
			errs[i] = fmt.Errorf("write %s: %w", files[i].Path, err)
		}
		return errs
	}
	defer os.RemoveAll(tmp)
	var inside []conf.File
	for _, i := range again {
		file := files[i]
		file.TmpDir = tmp
		inside = append(inside, file)
	}
	for j, err := range conf.WriteFiles(inside) {
		errs[again[j]] = err
	}
	return errs
}
