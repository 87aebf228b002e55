package doctor

import (
	"fmt"
	"net/netip"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall/foreign"
	"overlayd.internal/overlay/internal/mark"
)

// letThrough is what the rules of a host have to let through.
func (h *host) letThrough() foreign.Host {
	ip, second := h.state.IP, h.secondIP()
	out := foreign.Host{Devices: []string{conf.VTEPName}, Underlay4: !ip.Is6() || second.Is4(), Underlay6: ip.Is6() || second.Is6()}
	if second.IsValid() {
		out.Devices = append(out.Devices, mark.SecondVTEP)
	}
	for _, o := range h.state.Overlays {
		for _, pool := range o.Pools() {
			out.Devices = append(out.Devices, pool.Bridge.Name)
		}
		for _, s := range []netip.Prefix{o.Info.Subnet, o.Info.Subnet6} {
			if s.IsValid() {
				out.Subnets = append(out.Subnets, s)
			}
		}
	}
	return out
}

// stopped makes findings of what rules of others stop.
func stopped(found []foreign.Finding) (out []Finding) {
	for _, f := range found {
		out = append(out, Finding{Severity: Error, What: f.What, Evidence: f.Evidence, Object: f.Object, Fix: f.Fix, safe: f.Safe})
	}
	return out
}

func checkForwardPolicy(h *host) []Finding { return stopped(h.rules.Forward(h.letThrough())) }
func checkInput(h *host) []Finding         { return stopped(h.rules.Input(h.letThrough())) }
func checkUFW(h *host) []Finding           { return stopped(h.rules.UFW(h.letThrough())) }
func checkDocker(h *host) []Finding        { return stopped(h.rules.Docker(h.letThrough())) }

func checkFirewalld(h *host) []Finding {
	text, ok := output(h.ctx, "nft", "list", "table", "inet", "firewalld")
	if !ok || len(h.healthy()) == 0 {
		return nil
	}
	var outside []string
	for _, dev := range h.devices() {
		if !strings.Contains(text, `"`+dev+`"`) {
			outside = append(outside, dev)
		}
	}
	if len(outside) == 0 {
		return nil
	}
	return []Finding{{
		Severity: Error, What: "firewalld drops what is forwarded from and to devices that it does not trust",
		Evidence: "table inet firewalld names no zone for " + strings.Join(outside, ", "),
		// The agent does so by itself where it may; a zone of its own comes first.
		Fix: "firewall-cmd --permanent --zone=trusted --add-interface=" + strings.Join(outside, " --add-interface=") + " && firewall-cmd --reload",
	}}
}

// checkFlavours: rules of both flavours are asked, each knows nothing of the
// other, and what accepts in one is dropped in the other.
func checkFlavours(h *host) []Finding {
	nft, legacy := h.rules.Flavours()
	if nft == nil || legacy == nil {
		return nil
	}
	return []Finding{{
		Severity: Warning, What: "rules of both flavours of iptables are in use: a packet has to pass both, and each shows only its own",
		Evidence: fmt.Sprintf("%d rules of %s, %d of %s", nft.Lines, nft.Command, legacy.Lines, legacy.Command),
		Fix:      "move the rules of one to the other: iptables-legacy-save | iptables-nft-restore --noflush && iptables-legacy --flush",
	}}
}
