// Package document reads the small JSON documents of a host fast: the network
// configuration that a runtime passes to a CNI program, and the state that the
// agent publishes. A scanner (scan.go) reads what is nearly always written, and
// encoding/json the rest (ADR 0006).
package document

import (
	"encoding/json"

	"overlayd.internal/overlay/conf"
)

// ReadConf reads a network configuration. The first error is about the whole of
// it, a *SyntaxError or an *AmbiguousError, and then nothing was read. The second
// is encoding/json's about one value; everything else is in n.
func ReadConf(b []byte, n *conf.NetConf) (malformed, err error) {
	if scanConf(b, n) {
		return nil, nil
	}
	*n = conf.NetConf{}
	if err := Check(b); err != nil {
		return err, nil
	}
	return nil, json.Unmarshal(b, n)
}

// ReadState reads the published state. The error is encoding/json's.
func ReadState(b []byte, st *conf.State) error {
	if scanState(b, st) {
		return nil
	}
	*st = conf.State{}
	return json.Unmarshal(b, st)
}

// What follows lists the fields of conf.NetConf and conf.State once more. A test
// fails when one is missing.

func scanConf(b []byte, n *conf.NetConf) bool {
	s := &scanner{b: b}
	return s.document(fields{
		{"cniVersion", &n.CNIVersion},
		{"name", &n.Name},
		{"type", &n.Type},
		{"overlay", &n.Overlay},
		{"runDir", &n.RunDir},
		{"mtu", &n.MTU},
		{"hairpinMode", &n.HairpinMode},
		{"antispoof", &n.AntiSpoof},
		{"hostPorts", &n.HostPorts},
		{"half", (*string)(&n.Half)},
		{"ipam", func() {
			s.object(fields{
				{"type", &n.IPAM.Type},
				{"overlay", &n.IPAM.Overlay},
				{"runDir", &n.IPAM.RunDir},
				{"half", (*string)(&n.IPAM.Half)},
				{"routes", &n.IPAM.Routes},
				{"resolvConf", &n.IPAM.ResolvConf},
			})
		}},
		{"dns", func() {
			s.object(fields{
				{"nameservers", &n.DNS.Nameservers},
				{"domain", &n.DNS.Domain},
				{"search", &n.DNS.Search},
				{"options", &n.DNS.Options},
			})
		}},
		{"capabilities", func() { s.object(fields{{"portMappings", &n.Capabilities.PortMappings}}) }},
		{"runtimeConfig", func() {
			s.object(fields{
				{"ips", &n.RuntimeConfig.IPs},
				{"mac", &n.RuntimeConfig.MAC},
				{"portMappings", listOf(s, &n.RuntimeConfig.PortMappings, func(p *conf.PortMapping) {
					s.object(fields{
						{"hostPort", &p.HostPort}, {"containerPort", &p.ContainerPort},
						{"protocol", &p.Protocol}, {"hostIP", &p.HostIP},
					})
				})},
				{"bandwidth", &n.RuntimeConfig.Bandwidth},
			})
		}},
		{"args", func() {
			s.object(fields{
				{"cni", func() { s.object(fields{{"ips", &n.Args.CNI.IPs}}) }},
				{"org.apache.mesos", func() {
					s.object(fields{{"network_info", func() {
						n.Args.Mesos.NetworkInfo = new(conf.MesosNetworkInfo)
						s.mesos(n.Args.Mesos.NetworkInfo)
					}}})
				}},
			})
		}},
		{"prevResult", &n.PrevResult},
		{"cni.dev/valid-attachments", func() { n.ValidAttachments = s.attachments() }},
		{"cni.dev/attachments", func() { n.LegacyValidAttachments = s.attachments() }},
	})
}

func (s *scanner) mesos(n *conf.MesosNetworkInfo) {
	s.object(fields{
		{"name", &n.Name},
		{"ip_addresses", listOf(s, &n.IPAddresses, func(a *conf.MesosAddress) {
			s.object(fields{{"protocol", &a.Protocol}, {"ip_address", &a.IPAddress}})
		})},
		{"port_mappings", listOf(s, &n.PortMappings, func(p *conf.MesosPortMapping) {
			s.object(fields{
				{"host_port", &p.HostPort}, {"container_port", &p.ContainerPort}, {"protocol", &p.Protocol},
			})
		})},
		{"labels", func() {
			s.object(fields{{"labels", listOf(s, &n.Labels.Labels, func(l *conf.MesosLabel) {
				s.object(fields{{"key", &l.Key}, {"value", &l.Value}})
			})}})
		}},
	})
}

func (s *scanner) attachments() *[]conf.ValidAttachment {
	out := new([]conf.ValidAttachment)
	listOf(s, out, func(a *conf.ValidAttachment) {
		s.object(fields{{"containerID", &a.ContainerID}, {"ifname", &a.IfName}})
	})()
	return out
}

func scanState(b []byte, st *conf.State) bool {
	s := &scanner{b: b}
	return s.document(fields{
		{"agent_id", &st.AgentID},
		{"boot_id", &st.BootID},
		{"configuration_attempts", &st.ConfigurationAttempts},
		{"cooling_seconds", &st.CoolingSeconds},
		{"coordinators", &st.Coordinators},
		{"datapath", func() {
			s.object(fields{{"mode", &st.Datapath.Mode}, {"taken", &st.Datapath.Taken}, {"reason", &st.Datapath.Reason}, {"routing", (*string)(&st.Datapath.Routing)}})
		}},
		{"directories", func() {
			s.object(fields{
				{"cni_bin", &st.Directories.CNIBin},
				{"cni_conf", &st.Directories.CNIConf},
				{"state", &st.Directories.State},
			})
		}},
		{"drift", func() { st.Drift = s.drift() }},
		{"ip", &st.IP},
		{"lease", func() {
			s.object(fields{
				{"epoch", &st.Lease.Epoch},
				{"error", &st.Lease.Error},
				{"expires_boottime_ns", &st.Lease.ExpiresBoottime},
				{"lost", &st.Lease.Lost},
			})
		}},
		{"mtu", &st.MTU},
		{"notices", &st.Notices},
		{"overlays", listOf(s, &st.Overlays, s.overlay)},
		{"problems", &st.Problems},
		{"room", &st.Room},
		{"second_ip", &st.SecondIP},
		{"version", &st.Version},
	})
}

func (s *scanner) drift() *conf.DriftState {
	d := new(conf.DriftState)
	s.object(fields{
		{"counts", listOf(s, &d.Counts, func(c *conf.DriftCount) {
			s.object(fields{{"kind", &c.Kind}, {"objects", &c.Objects}})
		})},
		{"last", &d.Last},
		{"last_at", &d.LastAt},
	})
	return d
}

func (s *scanner) overlay(o *conf.AgentOverlay) {
	vxlan, info := &o.Backend.VXLAN, &o.Info
	s.object(fields{
		{"backend", func() {
			s.object(fields{{"vxlan", func() {
				s.object(fields{
					{"vni", &vxlan.VNI},
					{"vtep_ip", &vxlan.VTEPIP},
					{"vtep_ip6", &vxlan.VTEPIP6},
					{"vtep_mac", &vxlan.VTEPMAC},
					{"vtep_mtu", &vxlan.VTEPMTU},
					{"vtep_name", &vxlan.VTEPName},
				})
			}}})
		}},
		{"blocks", listOf(s, &o.Blocks, func(b *conf.Block) {
			s.object(fields{{"subnet", &b.Subnet}, {"subnet6", &b.Subnet6}})
		})},
		{"docker_bridge", func() { o.DockerBridge = s.bridge() }},
		{"info", func() {
			s.object(fields{
				{"allow", &info.Allow},
				{"antispoof", &info.AntiSpoof},
				{"blocks_per_agent", &info.BlocksPerAgent},
				{"draining", &info.Draining},
				{"enabled", &info.Enabled},
				{"halves", &info.Halves},
				{"isolation", &info.Isolation},
				{"name", &info.Name},
				{"prefix", &info.Prefix},
				{"prefix6", &info.Prefix6},
				{"subnet", &info.Subnet},
				{"subnet6", &info.Subnet6},
			})
		}},
		{"mesos_bridge", func() { o.MesosBridge = s.bridge() }},
		{"state", func() {
			o.State = new(conf.OverlayStatus)
			s.object(fields{{"error", &o.State.Error}, {"status", (*string)(&o.State.Status)}})
		}},
		{"subnet", &o.Subnet},
		{"subnet6", &o.Subnet6},
	})
}

func (s *scanner) bridge() *conf.Bridge {
	b := new(conf.Bridge)
	s.object(fields{{"ip", &b.IP}, {"ip6", &b.IP6}, {"name", &b.Name}})
	return b
}

// listOf returns what reads a list of objects into *to, each with one call of
// read.
func listOf[T any](s *scanner, to *[]T, read func(*T)) func() {
	return func() {
		*to = []T{}
		s.list(func() {
			var zero T
			*to = append(*to, zero)
			read(&(*to)[len(*to)-1])
		})
	}
}
