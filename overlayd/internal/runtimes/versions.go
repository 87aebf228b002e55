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

	"overlayd.internal/overlay/overlayd/internal/logkey"
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

// program is what there is to know of an executable file; nil: it is none.
func program(path string) fs.FileInfo {
	fi, err := os.Stat(path)
	if err != nil || !fi.Mode().IsRegular() || fi.Mode()&0o111 == 0 {
		return nil
	}
	return fi
}

// copies are the paths of a plugin that runtimes may use with our lists: those
// beside d-overlay, since many look in one directory only; without any, all.
func (f *Files) copies(plugin string) []string {
	var beside, all []string
	for _, dir := range f.CNIBinDirs {
		path := filepath.Join(dir, plugin)
		if program(path) == nil {
			continue
		}
		all = append(all, path)
		if program(filepath.Join(dir, "d-overlay")) != nil {
			beside = append(beside, path)
		}
	}
	if beside != nil {
		return beside
	}
	return all
}

// speaks reports whether the plugin says that it speaks a CNI version, in every
// copy: one that does not would refuse what it is then called with. One that
// cannot be found or asked does not.
func (f *Files) speaks(ctx context.Context, plugin, v string) bool {
	paths := f.copies(plugin)
	for _, path := range paths {
		if !slices.Contains(f.versionsOf(ctx, path), v) {
			return false
		}
	}
	return len(paths) > 0
}

// versionsOf are the versions one binary speaks; it is asked when it is new.
func (f *Files) versionsOf(ctx context.Context, path string) []string {
	fi := program(path)
	if fi == nil {
		return nil
	}
	last, asked := f.versions[path]
	if asked && last.modified.Equal(fi.ModTime()) && last.size == fi.Size() &&
		(last.failed.IsZero() || time.Since(last.failed) < retryAfter) {
		return last.versions
	}
	a := answer{modified: fi.ModTime(), size: fi.Size()}
	var err error
	if a.versions, err = askVersions(ctx, path); err != nil {
		if ctx.Err() != nil {
			return nil // we are being stopped; that says nothing about the plugin
		}
		a.failed = time.Now()
		f.Log.Warn("plugin does not say which CNI versions it speaks; only "+baseVersion+" is announced", logkey.Path, path, logkey.Err, err)
	}
	if f.versions == nil {
		f.versions = map[string]answer{}
	}
	f.versions[path] = a
	return a.versions
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
