package doctor

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
)

func (h *host) runs(path string) bool {
	_, err := os.Stat(h.path(path))
	return err == nil
}

// deviceNames are patterns of our devices, as in the files of the packages. Those of
// host ends have as many characters: others have a vmbr0 or vmnet8.
var deviceNames = [...]string{conf.VTEPName + "*", "m-*", "d-*", "vm????????????", "vd????????????"}

// configuration is the lines of the files of some directories that are no comments, in
// the order of directories and names. Of files of one name the last directory's counts.
func (h *host) configuration(globs ...string) (files [][]string) {
	last := map[string]string{}
	var all []string
	for _, g := range globs {
		paths, _ := filepath.Glob(h.path(g)) // the pattern is ours
		for _, p := range paths {
			last[filepath.Base(p)] = p
		}
		all = append(all, paths...)
	}
	for _, p := range all {
		b, err := os.ReadFile(p)
		if err != nil || last[filepath.Base(p)] != p {
			continue
		}
		lines := []string{p}
		for line := range strings.Lines(string(b)) {
			if line = strings.TrimSpace(line); line != "" && line[0] != '#' && line[0] != ';' {
				lines = append(lines, line)
			}
		}
		files = append(files, lines)
	}
	return files
}

func checkNetworkManager(h *host) []Finding {
	if !h.runs("run/NetworkManager/NetworkManager.pid") && !h.runs("run/NetworkManager/devices") {
		return nil
	}
	unmanaged, instead := false, ""
	// In the order of NetworkManager.
	for _, file := range h.configuration("usr/lib/NetworkManager/conf.d/*.conf", "run/NetworkManager/conf.d/*.conf", "etc/NetworkManager/NetworkManager.conf", "etc/NetworkManager/conf.d/*.conf") {
		for _, line := range file[1:] {
			key, value, _ := strings.Cut(line, "=")
			switch ours := strings.Contains(value, conf.VTEPName); strings.TrimSpace(key) {
			case "unmanaged-devices+":
				unmanaged = unmanaged || ours
			case "unmanaged-devices":
				if unmanaged && !ours {
					instead = file[0]
				}
				unmanaged = ours
			}
		}
	}
	if unmanaged {
		return nil
	}
	evidence := "it runs, and unmanaged-devices does not name " + conf.VTEPName
	if instead != "" {
		evidence += ": " + instead + " says something else in place of what named it"
	}
	return []Finding{{
		Severity: Warning, What: "NetworkManager manages the overlay's devices: a connection of its own for them would take addresses and routes off them",
		Evidence: evidence,
		// The name comes behind those of others.
		Fix: `printf '[keyfile]\nunmanaged-devices+=interface-name:` + strings.Join(deviceNames[:], ";interface-name:") + `\n' > ` +
			"/etc/NetworkManager/conf.d/zz-overlay.conf && systemctl reload NetworkManager",
	}}
}

func checkNetworkd(h *host) []Finding {
	if !h.runs("run/systemd/netif/links") {
		return nil
	}
	files := h.configuration("usr/lib/systemd/network/*.network", "run/systemd/network/*.network", "etc/systemd/network/*.network")
	// The first that matches counts, in whichever directory.
	slices.SortFunc(files, func(a, b []string) int { return strings.Compare(filepath.Base(a[0]), filepath.Base(b[0])) })
	for _, file := range files {
		for _, line := range file[1:] {
			if strings.Contains(line, conf.VTEPName) {
				return nil
			}
			if strings.ReplaceAll(line, " ", "") == "Name=*" {
				return []Finding{{
					Severity: Warning, What: "systemd-networkd manages every device: at its restart it takes ports out of the overlay's bridges",
					Evidence: file[0] + " matches Name=*, and none before it names " + conf.VTEPName,
					// The name comes before those of others.
					Fix: `printf '[Match]\nName=` + strings.Join(deviceNames[:], " ") + `\nKind=vxlan bridge veth\n[Link]\nUnmanaged=yes\n' > /etc/systemd/network/00-00-overlay.network` +
						" && networkctl reload",
				}}
			}
		}
	}
	return nil
}
