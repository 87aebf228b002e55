package conf

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
)

// NetConf is what a runtime passes to a CNI program on stdin, as far as we read
// it. Unknown keys are tolerated: runtimes add keys of their own.
type NetConf struct {
	CNIVersion string `json:"cniVersion"` // empty means 0.1.0
	Name       string `json:"name"`       // the CNI network
	Type       string `json:"type"`

	Overlay     string `json:"overlay"`     // default: Name
	RunDir      string `json:"runDir"`      // default: DefaultRunDir
	MTU         int    `json:"mtu"`         // default: the host's, from the published state
	HairpinMode *bool  `json:"hairpinMode"` // default: true
	AntiSpoof   *bool  `json:"antispoof"`   // default: true; false: it may send from any address
	HostPorts   *bool  `json:"hostPorts"`   // default: true; false: somebody else maps the host ports
	Half        Half   `json:"half"`        // overlay-ipam alone; m-overlay and d-overlay know theirs

	IPAM IPAMConf `json:"ipam"`

	// Capabilities are what the runtime is asked to say in RuntimeConfig.
	Capabilities struct {
		PortMappings bool `json:"portMappings"`
	} `json:"capabilities"`

	// DNS is what containers are to know about name servers. It is handed on to the
	// runtime in the result of ADD.
	DNS DNS `json:"dns"`

	RuntimeConfig struct {
		IPs          []string      `json:"ips"`
		MAC          string        `json:"mac"`
		PortMappings []PortMapping `json:"portMappings"`
		// Bandwidth is what the plugin bandwidth, behind ours, is to hold it to.
		Bandwidth json.RawMessage `json:"bandwidth"`
	} `json:"runtimeConfig"`

	Args struct {
		CNI struct {
			IPs []string `json:"ips"`
		} `json:"cni"`
		Mesos struct {
			NetworkInfo *MesosNetworkInfo `json:"network_info"`
		} `json:"org.apache.mesos"`
	} `json:"args"`

	PrevResult json.RawMessage `json:"prevResult"`

	// The two spellings of GC's list; nil when the key is absent, which is not
	// the same as an empty list.
	ValidAttachments       *[]ValidAttachment `json:"cni.dev/valid-attachments"`
	LegacyValidAttachments *[]ValidAttachment `json:"cni.dev/attachments"`
}

// IPAMConf is the "ipam" object. Under a main plugin that is not ours (bridge,
// ptp, ...) the keys of overlay-ipam may stand here instead of at the top.
type IPAMConf struct {
	Type    string `json:"type"`
	Overlay string `json:"overlay"`
	RunDir  string `json:"runDir"`
	Half    Half   `json:"half"`

	// The two keys of host-local that ours has too: routes instead of the default
	// one, a list of {"dst", "gw"}, and a resolv.conf to take the DNS of the result
	// from. Read by those who use them, since other IPAM plugins have keys of their
	// own.
	Routes     json.RawMessage `json:"routes"`
	ResolvConf string          `json:"resolvConf"`
}

// DNS is CNI's object of that name.
type DNS struct {
	Nameservers []string `json:"nameservers"`
	Domain      string   `json:"domain"`
	Search      []string `json:"search"`
	Options     []string `json:"options"`
}

// IsEmpty reports whether nothing is said.
func (d DNS) IsEmpty() bool {
	return len(d.Nameservers) == 0 && d.Domain == "" && len(d.Search) == 0 && len(d.Options) == 0
}

// PortMapping is one entry of the portMappings capability.
type PortMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

// MesosNetworkInfo is the NetworkInfo message Mesos' network/cni isolator adds
// under args."org.apache.mesos".network_info.
type MesosNetworkInfo struct {
	Name         string             `json:"name"`
	IPAddresses  []MesosAddress     `json:"ip_addresses"`
	PortMappings []MesosPortMapping `json:"port_mappings"`
	Labels       struct {
		Labels []MesosLabel `json:"labels"`
	} `json:"labels"`
}

// MesosNameLabel is the key of the label whose value is what people are shown as the
// task's name: Mesos itself tells none.
const MesosNameLabel = "name"

// Label is the value of the first label with a key; empty: there is none.
func (n MesosNetworkInfo) Label(key string) string {
	for _, l := range n.Labels.Labels {
		if l.Key == key {
			return l.Value
		}
	}
	return ""
}

// MesosLabel is what the framework, or whoever wrote the task, says of a NetworkInfo.
type MesosLabel struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

// MesosAddress is one address of a NetworkInfo.
type MesosAddress struct {
	Protocol  string `json:"protocol"`
	IPAddress string `json:"ip_address"`
}

// MesosPortMapping is one host port of a NetworkInfo.
type MesosPortMapping struct {
	HostPort      int    `json:"host_port"`
	ContainerPort int    `json:"container_port"`
	Protocol      string `json:"protocol"`
}

// ValidAttachment is one entry of GC's list.
type ValidAttachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

// OverlayName is the overlay the network belongs to.
func (n NetConf) OverlayName() string { return firstOf(n.Overlay, n.IPAM.Overlay, n.Name) }

// RunDirectory is where the agent publishes.
func (n NetConf) RunDirectory() string { return firstOf(n.RunDir, n.IPAM.RunDir, DefaultRunDir) }

// Hairpin reports whether a container may reach itself through the bridge.
func (n NetConf) Hairpin() bool { return n.HairpinMode == nil || *n.HairpinMode }

// MapsHostPorts reports whether the host ports that a container asks for are ours
// to see to. Behind mesos-cni-port-mapper, which passes them on to us after all,
// and before portmap in a chain, they are not.
func (n NetConf) MapsHostPorts() bool { return n.HostPorts == nil || *n.HostPorts }

// Unpublished reports whether it is certain that no host port leads to the
// container: the runtime says which do, to Mesos' plugins in args and to others
// where the configuration asks for the capability, and it names none.
func (n NetConf) Unpublished() bool {
	mesos := n.Args.Mesos.NetworkInfo
	if len(n.RuntimeConfig.PortMappings) > 0 || mesos != nil && len(mesos.PortMappings) > 0 {
		return false
	}
	return mesos != nil || n.Capabilities.PortMappings
}

// Shaped reports whether the runtime says that the container is to be held to a rate,
// which is done with qdiscs at its host end: not where clsact is
// (findings/bandwidth-clsact.sh).
func (n NetConf) Shaped() bool {
	b := n.RuntimeConfig.Bandwidth
	return len(b) > 0 && string(b) != "null"
}

// ChecksSources reports whether the container may only send from its own
// addresses, as far as the network has a say.
func (n NetConf) ChecksSources() bool { return n.AntiSpoof == nil || *n.AntiSpoof }

// StatePath is the published document the configuration points at.
func (n NetConf) StatePath() string { return filepath.Join(n.RunDirectory(), StateFile) }

// IPAMPath is the directory of the address stores.
func (n NetConf) IPAMPath() string { return filepath.Join(n.RunDirectory(), IPAMDir) }

func firstOf(s ...string) string {
	for _, v := range s {
		if v != "" {
			return v
		}
	}
	return ""
}

// ParseAddrs reads addresses as runtimes write them: with or without a prefix
// length.
func ParseAddrs(in []string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, s := range in {
		a, err := netip.ParseAddr(s)
		if err != nil {
			p, perr := netip.ParsePrefix(s)
			if perr != nil {
				return nil, fmt.Errorf("address %q: want 9.0.1.5 or 9.0.1.5/25", s)
			}
			a = p.Addr()
		}
		if a.Zone() != "" || a.Is4In6() {
			return nil, fmt.Errorf("address %q: no zone and no IPv4-mapped form, please", s)
		}
		out = append(out, a)
	}
	return out, nil
}
