// Package dcosstate reads what a running DC/OS cluster answers to GET
// /overlay-master/state, as far as it says who holds what. It is pure: what the
// coordinator makes of it is its own.
package dcosstate

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"overlayd.internal/overlay/conf"
)

// Agent is what one host holds.
type Agent struct {
	Path     string // of the agent in the document, as in agents[3]
	IP       netip.Addr
	VTEPPath string // of the first backend, which says the VTEP
	VTEP     netip.Addr
	VTEP6    netip.Addr
	MAC      conf.MAC
	Subnets  []Subnet
}

// Subnet is what a host holds of one overlay.
type Subnet struct {
	Path            string // as in agents[3].overlays[0]
	Overlay         string
	Subnet, Subnet6 netip.Prefix
}

// document is the answer. Every address in it is a text, so that one that is no
// address is reported with its place like everything else.
type document struct {
	Agents []struct {
		IP       string    `json:"ip"`
		Overlays []overlay `json:"overlays"`
	} `json:"agents"`
}

type overlay struct {
	Backend struct {
		VXLAN vxlan `json:"vxlan"`
	} `json:"backend"`
	Info struct {
		Name string `json:"name"`
	} `json:"info"`
	Subnet  string `json:"subnet"`
	Subnet6 string `json:"subnet6"`
}

type vxlan struct {
	VNI     int    `json:"vni"`
	VTEPIP  string `json:"vtep_ip"`
	VTEPIP6 string `json:"vtep_ip6"`
	VTEPMAC string `json:"vtep_mac"`
}

// reader collects what is wrong.
type reader struct{ problems []conf.Problem }

func (r *reader) add(path, format string, args ...any) {
	r.problems = append(r.problems, conf.Problem{Path: path, Text: fmt.Sprintf(format, args...)})
}

// Parse reads a document and returns everything in it that cannot be read, with
// its place. An agent without any overlay holds nothing, has no VTEP and is left
// out; skipped are the paths of those.
func Parse(data []byte) (agents []Agent, skipped []string, problems []conf.Problem) {
	var doc document
	r := &reader{}
	if err := json.Unmarshal(data, &doc); err != nil {
		r.add("", "%s; want the answer of GET /overlay-master/state of the DC/OS cluster", unreadable(data, err))
		return nil, nil, r.problems
	}
	if len(doc.Agents) == 0 {
		r.add("agents", "missing or empty; want the answer of GET /overlay-master/state of the DC/OS cluster, from its leading master")
	}
	for i, raw := range doc.Agents {
		path := fmt.Sprintf("agents[%d]", i)
		a := Agent{Path: path, IP: r.addr(path+".ip", raw.IP, false)}
		if len(raw.Overlays) == 0 {
			skipped = append(skipped, path)
			continue
		}
		r.overlays(&a, raw.Overlays)
		agents = append(agents, a)
	}
	return agents, skipped, r.problems
}

// unreadable says where JSON cannot be read.
func unreadable(data []byte, err error) string {
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return fmt.Sprintf("line %d: %v", line(data, syntax.Offset), err)
	case errors.As(err, &kind):
		return fmt.Sprintf("line %d: %s is a JSON %s", line(data, kind.Offset), kind.Field, kind.Value)
	}
	return err.Error()
}

func line(data []byte, offset int64) int {
	return 1 + strings.Count(string(data[:min(offset, int64(len(data)))]), "\n")
}

// overlays reads what an agent holds. All of its overlays name the same VTEP.
func (r *reader) overlays(a *Agent, raw []overlay) {
	names := map[string]string{}
	for i, o := range raw {
		path := fmt.Sprintf("%s.overlays[%d]", a.Path, i)
		backend := path + ".backend.vxlan"
		if i == 0 {
			a.VTEPPath = backend
			r.vtep(a, backend, o.Backend.VXLAN)
		} else if o.Backend.VXLAN != raw[0].Backend.VXLAN {
			r.add(backend, "differs from %s.overlays[0].backend.vxlan; an agent has one VTEP for all overlays", a.Path)
		}
		if other, twice := names[o.Info.Name]; twice {
			r.add(path+".info.name", "overlay %.80q stands at %s too", o.Info.Name, other)
			continue
		}
		names[o.Info.Name] = path
		s := Subnet{Path: path, Overlay: o.Info.Name}
		s.Subnet = r.subnet(path+".subnet", o.Subnet, true)
		s.Subnet6 = r.subnet(path+".subnet6", o.Subnet6, false)
		a.Subnets = append(a.Subnets, s)
	}
}

// vtep reads addresses, MAC and VNI of a VTEP.
func (r *reader) vtep(a *Agent, path string, v vxlan) {
	if v.VTEPIP != "" || v.VTEPIP6 == "" { // a cluster of ours with IPv6 alone has none
		a.VTEP = r.addr(path+".vtep_ip", v.VTEPIP, true)
	}
	if a.VTEP.IsValid() && !a.VTEP.Is4() {
		r.add(path+".vtep_ip", "%s is no IPv4 address", a.VTEP)
		a.VTEP = netip.Addr{}
	}
	if v.VTEPIP6 != "" {
		a.VTEP6 = r.addr(path+".vtep_ip6", v.VTEPIP6, true)
		if a.VTEP6.IsValid() && a.VTEP6.Is4() {
			r.add(path+".vtep_ip6", "%s is no IPv6 address", a.VTEP6)
			a.VTEP6 = netip.Addr{}
		}
	}
	if v.VTEPMAC != "" {
		mac, err := conf.ParseMAC(v.VTEPMAC)
		if err != nil {
			r.add(path+".vtep_mac", "%v", err)
		}
		a.MAC = mac
	}
	if v.VNI != 0 && v.VNI != conf.VNI {
		r.add(path+".vni", "%d; every host of this overlay network speaks VNI %d, so hosts of the two clusters would not hear each other", v.VNI, conf.VNI)
	}
}

// addr reads an address, which may have the length of its subnet behind it.
func (r *reader) addr(path, s string, length bool) netip.Addr {
	if s == "" {
		r.add(path, "missing")
		return netip.Addr{}
	}
	if p, err := netip.ParsePrefix(s); length && err == nil {
		return p.Addr()
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		r.add(path, "%.80q is no IP address", s)
	}
	return a
}

// subnet reads a prefix of one family; empty is none.
func (r *reader) subnet(path, s string, v4 bool) netip.Prefix {
	if s == "" {
		return netip.Prefix{}
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		r.add(path, "%.80q is no subnet such as 9.0.1.0/24", s)
		return netip.Prefix{}
	case p.Addr().Is4() != v4:
		r.add(path, "%s is a subnet of the other address family", p)
		return netip.Prefix{}
	}
	return p
}
