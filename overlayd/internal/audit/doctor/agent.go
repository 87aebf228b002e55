package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/published"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit"
)

const restart = "systemctl restart overlayd-agent"

func checkAgent(h *host) (out []Finding) {
	switch {
	case errors.Is(h.stateErr, fs.ErrNotExist) && h.running != nil && !errors.Is(h.running, fs.ErrPermission):
		return []Finding{{
			Severity: Error, What: "no agent runs here: no container can be attached",
			Evidence: fmt.Sprintf("%v; nothing is published in %s", h.running, h.RunDir), Fix: "systemctl enable --now overlayd-agent",
		}}
	case errors.Is(h.stateErr, fs.ErrNotExist):
		return []Finding{{
			Severity: Error, What: "the agent has not published anything yet: no container can be attached",
			Evidence: "there is no " + conf.StateFile + " in " + h.RunDir, Fix: "journalctl --unit overlayd-agent: its log says what it waits for",
		}}
	case h.stateErr != nil:
		return []Finding{{
			Severity: Error, What: "the published state cannot be read: no container can be attached",
			Evidence: h.stateErr.Error(), Fix: restart,
		}}
	}
	if errors.Is(h.running, fs.ErrPermission) {
		out = append(out, Finding{
			Severity: Warning, What: "whether the agent runs is not known: it may not be asked by this user", Evidence: h.running.Error(), Fix: "run this as root",
		})
	} else if h.running != nil {
		out = append(out, Finding{
			Severity: Error, What: "the agent does not run: the kernel is not repaired and new hosts are not reached",
			Evidence: h.running.Error(), Fix: restart,
		})
	}
	if h.state.BootID != h.books.Boot {
		out = append(out, Finding{
			Severity: Error, What: "the published state is of an earlier boot: containers would get wrong addresses",
			Evidence: fmt.Sprintf("boot_id is %s, this boot is %s", h.state.BootID, h.books.Boot), Fix: restart,
		})
	}
	return out
}

func checkLease(h *host) []Finding {
	l := h.state.Lease
	left := time.Duration(l.ExpiresBoottime) - conf.Boottime()
	const reach = "overlayctl agents, and make a coordinator reachable from here"
	switch {
	case l.Lost != "":
		return []Finding{{Severity: Error, What: "the lease of this host is lost: no container can be attached, and those that run may be cut off",
			Evidence: l.Lost, Fix: restart + ", then restart the containers of this host"}}
	case l.Epoch == 0:
		return []Finding{{Severity: Error, What: "this host has no lease: no container can be attached",
			Evidence: orUnknown(l.Error), Fix: reach}}
	case left <= 0:
		return []Finding{{Severity: Error, What: "the lease has run out: no container can be attached until it is renewed",
			Evidence: orUnknown(l.Error), Fix: reach}}
	case l.Error != "":
		return []Finding{{Severity: Warning, What: "the lease is not renewed: when it ends no container can be attached any more",
			Evidence: fmt.Sprintf("good for another %s; %s", left.Truncate(time.Minute), l.Error), Fix: reach}}
	}
	return nil
}

func orUnknown(s string) string {
	if s == "" {
		return "the coordinator did not answer"
	}
	return s
}

func checkOverlays(h *host) (out []Finding) {
	for _, o := range h.state.Overlays {
		if o.State != nil && o.State.Status != conf.StatusOK {
			out = append(out, Finding{Severity: Error, What: "overlay " + o.Info.Name + " is not set up on this host",
				Evidence: strings.TrimSpace(string(o.State.Status) + " " + o.State.Error), Fix: "docs/troubleshooting.md has the reasons and what to do"})
		}
	}
	for _, p := range h.state.Problems {
		out = append(out, Finding{Severity: Warning, What: "the agent reports a problem of this host", Evidence: p, Fix: "docs/troubleshooting.md has the reasons and what to do"})
	}
	return out
}

// full is the share of a table from which on it is near its end.
const full = float64(api.NearlyFull) / 100

func checkUse(h *host) (out []Finding) {
	for _, u := range audit.Sum(h.books.Usage()) {
		if published.HasRoom(h.state, u.Overlay) {
			continue
		}
		f := Finding{
			Severity: Warning, What: fmt.Sprintf("the %s of overlay %s is nearly full on this host: soon no container can be attached to it", u.Half.PoolText(), u.Overlay),
			Evidence: fmt.Sprintf("%s: %d used, %d cooling, %d in all", u.Ranges(), u.Used, u.Cooling, u.Total),
			Fix:      "overlayctl ipam shows who has the addresses; stop containers, or give new ones to another host or to an overlay with a shorter prefix",
		}
		switch u.Count().Level() {
		case api.LevelOK:
			continue
		case api.LevelFull:
			f.Severity, f.What = Error, fmt.Sprintf("the %s of overlay %s is full on this host: no container can be attached to it", u.Half.PoolText(), u.Overlay)
		}
		out = append(out, f)
	}
	return append(out, checkDockerIPv6(h)...)
}

// checkDockerIPv6 finds first subnets that Docker has IPv6 addresses of and that are
// nearly full: it gets none of further ones (ADR 0039), which count as room elsewhere.
func checkDockerIPv6(h *host) (out []Finding) {
	for _, o := range h.state.Overlays {
		if o.DockerBridge == nil || !slices.ContainsFunc(h.books.Stores[o.Info.Name].Records, func(r ipam.Record) bool {
			return r.IsDocker() && slices.ContainsFunc(r.Addrs, netip.Addr.Is6)
		}) {
			continue
		}
		for _, u := range h.books.Usage() {
			level := u.Count().Level()
			if u.Overlay != o.Info.Name || u.Range != o.DockerBridge.IP6 || level == api.LevelOK || len(o.Blocks) == 0 && !published.HasRoom(h.state, o.Info.Name) {
				continue
			}
			f := Finding{
				Severity: Warning, What: fmt.Sprintf("IPv6 addresses for Docker in overlay %s are nearly used up on this host: Docker gets them of the first subnet alone", u.Overlay),
				Evidence: fmt.Sprintf("%s: %d used, %d cooling, %d in all", u.Range, u.Used, u.Cooling, u.Total),
				Fix:      "give new containers to another host, to a runtime that attaches by CNI, or to an overlay with a shorter prefix6",
			}
			if level == api.LevelFull {
				f.Severity, f.What = Error, fmt.Sprintf("IPv6 addresses for Docker in overlay %s are used up on this host: Docker gets them of the first subnet alone", u.Overlay)
			}
			out = append(out, f)
		}
	}
	return out
}

func checkAddresses(h *host) (out []Finding) {
	for _, d := range audit.CompareAddresses(h.books) {
		what, fix, ok := strings.Cut(d.Text, "; ")
		if !ok {
			fix = "overlayctl ipam check"
		}
		overlay := "all overlays"
		if d.Overlay != "" {
			overlay = "overlay " + d.Overlay
		}
		out = append(out, Finding{Severity: Warning, What: "address stores, interfaces and lease do not agree: " + what, Evidence: overlay + " in " + h.RunDir, Fix: fix})
	}
	return out
}
