package runtimes

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/version"
)

const (
	// versionTimeout is how long a plugin may take to say which versions it
	// speaks. They need milliseconds; the rest is for a busy machine.
	versionTimeout = 5 * time.Second
	// retryAfter is how long a plugin that did not answer is left in peace.
	retryAfter = 10 * time.Minute
)

// answer is what one binary said about VERSION. It is good until the file
// changes.
type answer struct {
	modified time.Time
	size     int64
	versions []string
	failed   time.Time // zero: it answered
}

// find returns the path of a plugin in the binary directories, or "".
func (f *Files) find(plugin string) string {
	path, _ := f.look(plugin)
	return path
}

func (f *Files) look(plugin string) (string, fs.FileInfo) {
	for _, dir := range f.CNIBinDirs {
		path := filepath.Join(dir, plugin)
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return path, fi
		}
	}
	return "", nil
}

// speaks reports whether the plugin says that it speaks a CNI version. One that
// cannot be found or asked does not.
func (f *Files) speaks(ctx context.Context, plugin, v string) bool {
	path, fi := f.look(plugin)
	if path == "" {
		return false
	}
	known, ok := f.versions[path]
	if ok && known.modified.Equal(fi.ModTime()) && known.size == fi.Size() &&
		(known.failed.IsZero() || time.Since(known.failed) < retryAfter) {
		return slices.Contains(known.versions, v)
	}
	a := answer{modified: fi.ModTime(), size: fi.Size()}
	var err error
	if a.versions, err = askVersions(ctx, path); err != nil {
		if ctx.Err() != nil {
			return false // we are being stopped; that says nothing about the plugin
		}
		a.failed = time.Now()
		f.Log.Warn("plugin does not say which CNI versions it speaks; only "+baseVersion+" is announced", "path", path, "err", err)
	}
	if f.versions == nil {
		f.versions = map[string]answer{}
	}
	f.versions[path] = a
	return slices.Contains(a.versions, v)
}

// askVersions runs the VERSION verb of one plugin.
func askVersions(ctx context.Context, path string) ([]string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, versionTimeout, fmt.Errorf("no answer in %s", versionTimeout))
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	// Plugins built against an old skel want the other variables for VERSION too.
	cmd.Env = []string{"CNI_COMMAND=VERSION", "CNI_IFNAME=dummy", "CNI_NETNS=dummy", "CNI_PATH=dummy", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Dir = "/"
	cmd.Stdin = strings.NewReader(`{"cniVersion":"` + baseVersion + `"}`)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = time.Second // a child of the plugin may hold stdout open
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("run VERSION: %w: %s", err, clip(stderr.String()+stdout.String()))
	}
	info, err := new(version.PluginDecoder).Decode(stdout.Bytes())
	if err != nil {
		return nil, err
	}
	return info.SupportedVersions(), nil
}

// clip keeps the beginning of what a plugin said, for an error message.
func clip(s string) string {
	const most = 200
	if s = strings.TrimSpace(s); len(s) > most {
		s = s[:most] + "..."
	}
	return s
}
