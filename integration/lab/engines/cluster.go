package engines

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Where the hosts of a cluster have things.
const (
	UCRConfDir = "/etc/mesos/cni"
	PluginDir  = "/opt/cni/bin"
)

// The overlays of a cluster: one of each kind. The first is the first in the
// order of names too, because containerd uses the first network file it finds.
const (
	Both    = "both"
	IPv4    = "dcos"
	IPv6    = "dcos6"
	network = `dcos_overlay_network:
  vtep_subnet: 44.128.0.0/20
  vtep_subnet6: fd01:a::/64
  vtep_mac_oui: 70:B3:D5:00:00:00
  overlays:
    - {name: both, subnet: 10.64.0.0/16, prefix: 24, subnet6: "fd01:c::/64", prefix6: 80}
    - {name: dcos, subnet: 9.0.0.0/8, prefix: 24}
    - {name: dcos6, subnet6: "fd01:b::/64", prefix6: 80}
`
)

// Cluster is a lab with a coordinator on its lan and an agent on every host.
type Cluster struct {
	*Lab
	Hosts       []*Host
	Coordinator *Daemon
	Agents      []*Daemon // of the host with the same index

	bin string
}

// NewCluster makes hosts named h1, h2 and so on, with the programs in bin, and
// returns when every agent has published its networks. The lab keeps what was made when that
// fails.
func (l *Lab) NewCluster(ctx context.Context, bin string, hosts int) (*Cluster, error) {
	return l.newCluster(ctx, bin, hosts, network)
}

// newCluster is NewCluster with another configuration.
func (l *Lab) newCluster(ctx context.Context, bin string, hosts int, network string) (*Cluster, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	c := &Cluster{Lab: l, bin: bin}
	if err := l.LAN.Write("/etc/overlay/overlay.yaml", network); err != nil {
		return nil, err
	}
	c.Coordinator, err = l.LAN.Start("coordinator", filepath.Join(bin, "overlayd"), "coordinator", "--config", "/etc/overlay/overlay.yaml", "--insecure")
	if err != nil {
		return nil, err
	}
	for i := range hosts {
		h, err := l.AddHost(ctx, fmt.Sprintf("h%d", i+1))
		if err != nil {
			return nil, err
		}
		c.Hosts = append(c.Hosts, h)
		c.Agents = append(c.Agents, nil)
		if err := c.install(h); err != nil {
			return nil, err
		}
		if err := c.StartAgent(i); err != nil {
			return nil, err
		}
	}
	for i := range hosts {
		if err := c.AgentReady(ctx, i); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// install puts our plugins and the reference ones that go with them onto a host.
func (c *Cluster) install(h *Host) error {
	var programs []string
	for _, p := range []string{"m-overlay", "d-overlay", "overlay-ipam"} {
		programs = append(programs, filepath.Join(c.bin, p))
	}
	for _, p := range []string{"loopback", "portmap"} {
		programs = append(programs, filepath.Join(c.tools, "plugins", p))
	}
	return h.Install(PluginDir, programs...)
}

// StartAgent starts the agent of a host.
func (c *Cluster) StartAgent(host int) (err error) {
	h := c.Hosts[host]
	c.Agents[host], err = h.Start("agent", filepath.Join(c.bin, "overlayd"), "agent",
		"--coordinator", "http://"+c.LAN.IP.String()+":6440", "--agent-ip", h.IP.String(),
		"--ucr-conf-dir", UCRConfDir, "--insecure", "--datapath", cmp.Or(os.Getenv("OVERLAY_DATAPATH"), "auto"))
	return err
}

// Datapath is which way the traffic of a host takes, and why.
func (c *Cluster) Datapath(h *Host) (taken, reason string, err error) {
	var state struct {
		Datapath struct{ Taken, Reason string }
	}
	b, err := os.ReadFile(h.File("/run/overlay/state.json"))
	if err == nil {
		err = json.Unmarshal(b, &state)
	}
	return state.Datapath.Taken, state.Datapath.Reason, err
}

// FastPackets are those that the fast path of a host took, by what it said of
// itself: in both directions, with other hosts.
func (c *Cluster) FastPackets(ctx context.Context, h *Host) (sum float64, err error) {
	page, err := h.Exec(ctx, "busybox", "wget", "-q", "-O-", "http://127.0.0.1:6441/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(page) {
		if !strings.HasPrefix(line, "overlay_agent_traffic_packets_total{") || !strings.Contains(line, `path="fast"`) || strings.Contains(line, `direction="local"`) {
			continue
		}
		f := strings.Fields(line)
		n, err := strconv.ParseFloat(f[len(f)-1], 64)
		if err != nil {
			return 0, fmt.Errorf("metrics of %s: %w", h.Name, err)
		}
		sum += n
	}
	return sum, nil
}

// AgentReady waits until a host has the files of all overlays and its agent
// says that it is ready.
func (c *Cluster) AgentReady(ctx context.Context, host int) error {
	h := c.Hosts[host]
	return h.ready(ctx, c.Agents[host], "sh", "-ec", `
		for overlay in both dcos dcos6; do
			test -e /etc/cni/net.d/87-$overlay.conflist
			test -e `+UCRConfDir+`/$overlay.conf
		done
		busybox wget -q -O- http://127.0.0.1:6441/readyz`)
}

// Leftovers are what containers left on a host: links, namespaces, rules of
// host ports, and whatever overlayctl finds not to agree. Nothing is left when
// it is empty.
func (c *Cluster) Leftovers(ctx context.Context, h *Host) (string, error) {
	var left []string
	links, err := h.Exec(ctx, "sh", "-ec", "ip -o link show type veth | sed 's/^[0-9]*: //; s/[:@].*//'")
	if err != nil {
		return "", err
	}
	for l := range strings.FieldsSeq(links) {
		if l != "eth0" {
			left = append(left, "link "+l)
		}
	}
	// Docker unmounts a namespace at once, and removes the empty file under it up
	// to two minutes later.
	files, err := h.Exec(ctx, "sh", "-c", "find /run/netns /var/lib/cni "+ucrRoot+` -mindepth 1 ! -type d 2>/dev/null
		grep -o ' /run/docker/netns/[^ ]*' /proc/mounts; true`)
	if err != nil {
		return "", err
	}
	for f := range strings.FieldsSeq(files) {
		left = append(left, "file "+f)
	}
	rules, err := h.Exec(ctx, "sh", "-ec", "iptables -t nat -S; ip6tables -t nat -S")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(rules) {
		// portmap keeps its own chains; those of a container start with CNI-DN-.
		if strings.Contains(line, "CNI-DN-") || strings.Contains(line, "--to-destination") {
			left = append(left, "rule "+strings.TrimSpace(line))
		}
	}
	attached, err := c.Attached(ctx, h)
	return strings.Join(append(left, attached...), "\n"), err
}

// Attached are the addresses a host has given out, and whatever overlayctl
// finds not to agree.
func (c *Cluster) Attached(ctx context.Context, h *Host) ([]string, error) {
	attachments, err := c.Attachments(ctx, h)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, a := range attachments {
		all = append(all, fmt.Sprintf("attachment of %s with %s", a.Container, a.Addrs))
	}
	if err := c.Check(ctx, h); err != nil {
		all = append(all, err.Error())
	}
	return all, nil
}

// Check lets overlayctl compare address stores, kernel and lease of a host.
func (c *Cluster) Check(ctx context.Context, h *Host) error {
	_, err := h.Exec(ctx, filepath.Join(c.bin, "overlayctl"), "ipam", "check")
	return err
}

// Listed is a container in the coordinator's view of the cluster.
type Listed struct {
	ID, Runtime, Name string
	Addresses         []netip.Addr
}

// Containers are those in the coordinator's view of the cluster that match a text.
func (c *Cluster) Containers(ctx context.Context, text string) ([]Listed, error) {
	out, err := c.LAN.Exec(ctx, "busybox", "wget", "-q", "-O-", "http://127.0.0.1:6440/v1/containers?q="+text)
	if err != nil {
		return nil, err
	}
	var found struct{ Containers []Listed }
	if err := json.Unmarshal([]byte(out), &found); err != nil {
		return nil, fmt.Errorf("GET /v1/containers: %w: %s", err, out)
	}
	return found.Containers, nil
}

// Attachment is a record of the host's address stores.
type Attachment struct {
	Overlay   string
	Half      string
	Container string `json:"container_id"`
	IfName    string
	Addrs     []netip.Addr
}

// Attachments are all of a host, as overlayctl lists them.
func (c *Cluster) Attachments(ctx context.Context, h *Host) ([]Attachment, error) {
	out, err := h.Exec(ctx, filepath.Join(c.bin, "overlayctl"), "ipam", "list", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct{ Attachments []Attachment }
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("overlayctl ipam list: %w: %s", err, out)
	}
	return list.Attachments, nil
}
