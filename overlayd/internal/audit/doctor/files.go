package doctor

import (
	"crypto/sha256"
	"crypto/x509"
	"debug/buildinfo"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
)

// checkCNIOrder: a runtime that is not told a network takes the first file of
// the directory.
func checkCNIOrder(h *host) (out []Finding) {
	if h.dirs.CNIConf == "" || len(h.healthy()) == 0 {
		return nil
	}
	entries, err := os.ReadDir(h.dirs.CNIConf)
	if err != nil {
		return []Finding{{Severity: Error, What: "the directory of CNI networks cannot be read: runtimes find no overlay",
			Evidence: err.Error(), Fix: "mkdir --parents " + h.dirs.CNIConf + " && " + restart}}
	}
	first := ""
	present := map[string]bool{}
	for _, e := range entries { // sorted
		ext := filepath.Ext(e.Name())
		if ext != ".conf" && ext != ".conflist" && ext != ".json" {
			continue
		}
		present[e.Name()] = true
		if first == "" {
			first = e.Name()
		}
	}
	for _, o := range h.healthy() {
		name := "87-" + o.Info.Name + ".conflist"
		if o.Bridge(conf.Docker) != nil && !present[name] {
			out = append(out, Finding{Severity: Error, What: "the CNI network of overlay " + o.Info.Name + " is missing: runtimes do not find it",
				Evidence: "there is no " + filepath.Join(h.dirs.CNIConf, name), Fix: restart})
		}
	}
	if first != "" && first < "87-" {
		out = append(out, Finding{
			Severity: Warning, What: "runtimes that are not told a network take another one before an overlay",
			Evidence: filepath.Join(h.dirs.CNIConf, first) + " comes first", Fix: "remove it, or name the network when a container is started",
		})
	}
	return out
}

func (h *host) programs(name string) (paths []string) {
	for _, dir := range h.dirs.CNIBin {
		path := filepath.Join(dir, name)
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			paths = append(paths, path)
		}
	}
	return paths
}

func checkPortmap(h *host) []Finding {
	if len(h.healthy()) == 0 || h.dirs.CNIConf == "" || len(h.programs("portmap")) > 0 {
		return nil
	}
	return []Finding{{
		Severity: Warning, What: "the plugin portmap is missing: host ports of containers are not mapped",
		Evidence: "not in " + strings.Join(h.dirs.CNIBin, ", "), Fix: "apt-get install containernetworking-plugins, then " + restart,
	}}
}

func checkPlugins(h *host) (out []Finding) {
	if len(h.dirs.CNIBin) == 0 {
		return nil // an agent of an earlier release does not say where they are
	}
	for _, half := range conf.Halves {
		name := string(half[0]) + "-overlay"
		if slices.ContainsFunc(h.healthy(), func(o conf.AgentOverlay) bool { return o.Bridge(half) != nil }) && len(h.programs(name)) == 0 {
			if half == conf.Mesos && h.dirs.CNIConf == "" {
				continue
			}
			out = append(out, Finding{
				Severity: Error, What: "the plugin " + name + " is missing: no container can be attached to the " + string(half) + " half",
				Evidence: "not in " + strings.Join(h.dirs.CNIBin, ", "), Fix: "install it into a directory in which the runtime looks for CNI plugins",
			})
		}
	}
	return out
}

// checkPluginVersions: runtimes look in different directories, and a forgotten
// copy is of an earlier version; so is a plugin that was not replaced with the others.
func checkPluginVersions(h *host) (out []Finding) {
	var first, version string
	for _, name := range []string{"m-overlay", "d-overlay", "overlay-ipam"} {
		paths := h.programs(name)
		if len(paths) == 0 {
			continue
		}
		for _, p := range paths[1:] {
			if digest(p) != digest(paths[0]) {
				out = append(out, Finding{
					Severity: Warning, What: "there are different versions of the plugin " + name + ": which one runs depends on the runtime",
					Evidence: paths[0] + " and " + p + " differ", Fix: "replace the older one by a copy of the newer, by rename, as docs/upgrade.md shows",
				})
			}
		}
		switch v := versionOf(paths[0]); {
		case v == "":
		case first == "":
			first, version = paths[0], v
		case v != version:
			out = append(out, Finding{
				Severity: Warning, What: "the plugins " + filepath.Base(first) + " and " + name + " are of different versions",
				Evidence: first + " is " + version + ", " + paths[0] + " is " + v, Fix: "install all plugins of the newer version",
			})
		}
	}
	return out
}

// versionOf is what a program was stamped with; of what is no program of Go it is empty.
func versionOf(path string) string {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return ""
	}
	return info.Main.Version
}

// digest is of the content; of what cannot be read it is zero.
func digest(path string) (sum [sha256.Size]byte) {
	f, err := os.Open(path)
	if err != nil {
		return sum
	}
	defer f.Close()
	d := sha256.New()
	if _, err := io.Copy(d, f); err == nil {
		d.Sum(sum[:0])
	}
	return sum
}

// renewBy is when a certificate should have been renewed.
const renewBy = 7 * 24 * time.Hour

func checkCertificates(h *host) (out []Finding) {
	paths, _ := filepath.Glob(filepath.Join(h.dirs.State, "pki", "*")) // the pattern is ours
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil || !strings.Contains(string(b), "BEGIN CERTIFICATE") {
			continue
		}
		for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				continue
			}
			left := time.Until(c.NotAfter)
			if left > min(renewBy, c.NotAfter.Sub(c.NotBefore)/4) {
				continue
			}
			f := Finding{Severity: Warning, What: "a certificate of this host runs out soon and has not been renewed",
				Evidence: fmt.Sprintf("%s: good until %s", p, c.NotAfter.UTC().Format(time.RFC3339)),
				Fix:      restart + " # if that does not help, join again with a token of overlayctl token create"}
			if left <= 0 {
				f.Severity, f.What = Error, "a certificate of this host has run out: the coordinator refuses it"
			}
			out = append(out, f)
		}
	}
	return out
}
