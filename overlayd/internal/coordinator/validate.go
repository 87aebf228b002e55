package coordinator

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// What is kept of the texts an agent sends, in bytes.
const (
	maxVersion     = 64
	maxStatusError = 1024
	maxInstance    = 64
)

func checkAgentID(id string) error {
	if err := conf.CheckAgentID(id); err != nil {
		return refuse(http.StatusBadRequest, "agent_id %v", err)
	}
	return nil
}

// validateRegister refuses what is wrong and puts the rest into one form.
func (c *Coordinator) validateRegister(req *api.RegisterRequest) error {
	if err := checkAgentID(req.AgentID); err != nil {
		return err
	}
	if req.ClusterID != "" && req.ClusterID != c.clusterID {
		return refuseKind(api.KindOtherCluster,
			"this coordinator is of cluster %s, and agent %s holds a lease of cluster %.80q; nothing was leased", c.clusterID, req.AgentID, req.ClusterID)
	}
	for _, n := range c.networks {
		if err := conf.CheckInNetwork(req.AgentIP, n); err != nil {
			return refuse(http.StatusBadRequest, "agent_ip of agent %s: %v", req.AgentID, err)
		}
	}
	if err := c.network().checkAgentIP(req); err != nil {
		return err
	}
	var bridges []conf.Half
	for _, h := range req.Bridges {
		if _, err := conf.ParseHalf(string(h)); err != nil {
			return refuse(http.StatusBadRequest, "bridges of agent %s: %.80q is neither %q nor %q", req.AgentID, h, conf.Mesos, conf.Docker)
		}
		if slices.Contains(bridges, h) {
			return refuse(http.StatusBadRequest, "bridges of agent %s: %q stands there twice", req.AgentID, h)
		}
		bridges = append(bridges, h)
	}
	req.Bridges = nil
	for _, h := range conf.Halves {
		if slices.Contains(bridges, h) {
			req.Bridges = append(req.Bridges, h)
		}
	}
	if len(req.Instance) > maxInstance || len(req.Previous) > api.MaxPrevious || slices.ContainsFunc(req.Previous, func(i string) bool { return len(i) > maxInstance }) {
		return refuse(http.StatusBadRequest, "instance of agent %s: want names of at most %d bytes, and at most %d of them", req.AgentID, maxInstance, api.MaxPrevious)
	}
	if err := conf.CheckUnderlay(req.Underlay); err != nil {
		return refuse(http.StatusBadRequest, "agent %s: %v", req.AgentID, err)
	}
	if err := c.validateRoom(req); err != nil {
		return err
	}
	req.Version = clip(req.Version, maxVersion)
	return c.checkShown(req)
}

// checkAgentIP refuses an agent whose address cannot be that of a host on the underlay.
func (n *network) checkAgentIP(req *api.RegisterRequest) error {
	if err := checkAgentIP(n.Network, req.AgentIP); err != nil {
		return refuse(http.StatusBadRequest, "agent_ip of agent %s: %v", req.AgentID, err)
	}
	return nil
}

// checkAgentIP says why an address cannot be that of a host on the underlay.
func checkAgentIP(n conf.Network, ip netip.Addr) error {
	if err := conf.CheckAgentIP(ip); err != nil {
		return err
	}
	switch {
	case n.VTEPSubnet.Contains(ip), n.VTEPSubnet6.Contains(ip):
		return fmt.Errorf("%s lies in a VTEP subnet; pass the address outside the overlay as --agent-ip", ip)
	}
	for _, o := range n.Overlays {
		if o.Subnet.Contains(ip) || o.Subnet6.Contains(ip) {
			return fmt.Errorf("%s lies in overlay %s; pass the address outside the overlay as --agent-ip", ip, o.Name)
		}
	}
	return nil
}

// clip cuts a text to at most n bytes of valid UTF-8. What it cuts off is not kept in
// memory.
func clip(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return strings.Clone(s[:n])
}
