// Package report gathers what somebody needs who looks at a host from afar: the
// documents of the agent, the kernel's tables, firewalls, settings, logs and what
// doctor finds, in one archive without secrets.
package report

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
)

// Options say what to gather.
type Options struct {
	RunDir string
	Dirs   conf.Directories
	// Documents are added as JSON, by the name of the file; a value that is an error
	// becomes its text.
	Documents map[string]any
	// Progress is called with the name of each file before it is made; may be nil.
	Progress func(name string)
}

// perCommand is how long one command may take.
const perCommand = 20 * time.Second

// maxFile is how much of a file or an output is kept: its end.
const maxFile = 8 << 20

// commands are what is asked, by the name of the file.
func commands() map[string]string {
	return map[string]string{
		"kernel/version.txt":      "uname -a; cat /etc/os-release",
		"kernel/links.txt":        "ip -details -statistics link show",
		"kernel/addresses.txt":    "ip address show",
		"kernel/routes.txt":       "ip route show table all; ip -6 route show table all",
		"kernel/rules.txt":        "ip rule show; ip -6 rule show",
		"kernel/neighbours.txt":   "ip neighbour show; ip -6 neighbour show",
		"kernel/fdb.txt":          "bridge fdb show",
		"kernel/bridges.txt":      "bridge -details link show; bridge vlan show",
		"kernel/sockets.txt":      "ss --listening --tcp --udp --numeric --processes",
		"kernel/sysctl.txt":       "sysctl --all --pattern '^net\\.(ipv4|ipv6|netfilter|bridge)\\.'",
		"kernel/modules.txt":      "cat /proc/modules",
		"kernel/messages.txt":     "dmesg --ctime | tail -n 2000",
		"firewall/iptables.txt":   "for p in iptables-nft iptables-legacy ip6tables-nft ip6tables-legacy; do echo \"# $p\"; $p-save --counters; done",
		"firewall/nftables.txt":   "nft list ruleset",
		"logs/agent.txt":          "journalctl --unit overlayd-agent --lines 5000 --no-pager",
		"logs/coordinator.txt":    "journalctl --unit overlayd-coordinator --lines 5000 --no-pager",
		"runtimes/docker.txt":     "docker network ls; docker version",
		"runtimes/containerd.txt": "containerd --version",
	}
}

// Write writes the archive, compressed. What cannot be had is in it as the reason
// why.
func Write(ctx context.Context, w io.Writer, o Options) error {
	z := gzip.NewWriter(w)
	a := &archive{tar: tar.NewWriter(z), scrubber: newScrubber(), now: time.Now(), progress: o.Progress}
	for _, name := range sorted(o.Documents) {
		if err := a.add(name, document(o.Documents[name])); err != nil {
			return err
		}
	}
	for _, path := range o.files() {
		b, err := tail(path)
		if err != nil {
			b = []byte(err.Error())
		}
		if err := a.add("files"+path, b); err != nil {
			return err
		}
	}
	all := commands()
	for _, name := range sorted(all) {
		if err := a.add(name, run(ctx, all[name])); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	if err := a.tar.Close(); err != nil {
		return err
	}
	return z.Close()
}

func sorted[V any](m map[string]V) (names []string) {
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// files are those that are copied. Keys and certificates are not among them. Of a host
// where nothing is published some directories are not known: "*" would be the files of
// whoever asks.
func (o Options) files() (paths []string) {
	patterns := []string{"/etc/overlay/*.yaml"}
	in := func(dir string, names ...string) {
		for _, name := range names {
			if dir != "" {
				patterns = append(patterns, filepath.Join(dir, name))
			}
		}
	}
	in(o.RunDir, conf.StateFile)
	in(o.Dirs.State, "agent-id", "lease.json", "peers.json")
	in(o.Dirs.CNIConf, "*")
	for _, pattern := range patterns {
		found, _ := filepath.Glob(pattern) // the pattern is ours
		for _, p := range found {
			if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() {
				if p, err = filepath.Abs(p); err == nil {
					paths = append(paths, p)
				}
			}
		}
	}
	return paths
}

func document(v any) []byte {
	if err, ok := v.(error); ok {
		return []byte(err.Error() + "\n")
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return []byte(err.Error() + "\n")
	}
	return append(b, '\n')
}

// tail reads the end of a file.
func tail(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > maxFile {
		if _, err := f.Seek(-maxFile, io.SeekEnd); err != nil {
			return nil, err
		}
	}
	return io.ReadAll(io.LimitReader(f, maxFile))
}

// run is what a command prints, with its errors.
func run(ctx context.Context, script string) []byte {
	ctx, cancel := context.WithTimeout(ctx, perCommand)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", script)
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	b := out.Bytes()
	b = b[max(0, len(b)-maxFile):]
	if err != nil {
		b = append(b, fmt.Sprintf("\n%s: %v\n", script, err)...)
	}
	return b
}

type archive struct {
	*scrubber
	tar      *tar.Writer
	now      time.Time
	progress func(string)
}

func (a *archive) add(name string, b []byte) error {
	if a.progress != nil {
		a.progress(name)
	}
	b = a.scrub(b)
	h := &tar.Header{Name: "overlay-report/" + strings.TrimPrefix(name, "/"), Mode: 0o600, Size: int64(len(b)), ModTime: a.now}
	if err := a.tar.WriteHeader(h); err != nil {
		return err
	}
	_, err := a.tar.Write(b)
	return err
}
