package cni

import (
	"net"
	"strconv"

	"github.com/containernetworking/cni/pkg/types"
	types020 "github.com/containernetworking/cni/pkg/types/020"
	types040 "github.com/containernetworking/cni/pkg/types/040"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// resultText is the result as printJSON would print it, keys in the order of
// encoding/json: sorted in what types100 prints, as declared in the older
// formats. ok is false for a result that has more in it than our own ones:
// values that need escapes, DNS, routes with metrics.
func resultText(r types.Result) (text []byte, ok bool) {
	p := &printer{b: make([]byte, 0, 1024), ok: true}
	switch r := r.(type) {
	case *types100.Result:
		p.result100(r)
	case *types040.Result:
		p.result040(r)
	case *types020.Result:
		p.result020(r)
	default:
		return nil, false
	}
	return append(p.b, '\n'), p.ok
}

func (p *printer) result100(r *types100.Result) {
	p.want(r.DNS.IsEmpty())
	p.open('{')
	p.text("cniVersion", r.CNIVersion)
	printList(p, "interfaces", r.Interfaces, func(i *types100.Interface) {
		p.want(i.SocketPath == "" && i.PciID == "" && i.Name != "")
		p.text("mac", i.Mac)
		p.number("mtu", i.Mtu)
		p.text("name", i.Name)
		p.text("sandbox", i.Sandbox)
	})
	printList(p, "ips", r.IPs, func(ip *types100.IPConfig) {
		p.text("address", ip.Address.String())
		p.ip("gateway", ip.Gateway)
		p.index("interface", ip.Interface)
	})
	printList(p, "routes", r.Routes, p.route)
	p.close('}')
}

func (p *printer) result040(r *types040.Result) {
	p.open('{')
	p.text("cniVersion", r.CNIVersion)
	printList(p, "interfaces", r.Interfaces, func(i *types040.Interface) {
		p.want(i.Name != "")
		p.text("name", i.Name)
		p.text("mac", i.Mac)
		p.text("sandbox", i.Sandbox)
	})
	printList(p, "ips", r.IPs, func(ip *types040.IPConfig) {
		p.text("version", ip.Version)
		p.index("interface", ip.Interface)
		p.text("address", ip.Address.String())
		p.ip("gateway", ip.Gateway)
	})
	printList(p, "routes", r.Routes, p.route)
	p.dns(r.DNS)
	p.close('}')
}

func (p *printer) result020(r *types020.Result) {
	p.open('{')
	p.text("cniVersion", r.CNIVersion)
	p.config020("ip4", r.IP4)
	p.config020("ip6", r.IP6)
	p.dns(r.DNS)
	p.close('}')
}

func (p *printer) config020(key string, c *types020.IPConfig) {
	if c == nil {
		return
	}
	p.key(key)
	p.open('{')
	p.text("ip", c.IP.String())
	p.ip("gateway", c.Gateway)
	var routes []*types.Route
	for i := range c.Routes {
		routes = append(routes, &c.Routes[i])
	}
	printList(p, "routes", routes, p.route)
	p.close('}')
}

func (p *printer) route(r *types.Route) {
	p.want(r.MTU == 0 && r.AdvMSS == 0 && r.Priority == 0 && r.Table == nil && r.Scope == nil)
	p.text("dst", r.Dst.String())
	p.ip("gw", r.GW)
}

// dns prints the empty object that the older formats always have.
func (p *printer) dns(d types.DNS) {
	p.want(d.IsEmpty())
	p.key("dns")
	p.open('{')
	p.close('}')
}

// A printer prints JSON, four spaces for each level. As encoding/json does for
// these types, it leaves out what is empty.
type printer struct {
	b     []byte
	depth int
	ok    bool // all that was printed needs no escapes and is of our own kind
}

func (p *printer) want(ok bool) { p.ok = p.ok && ok }

func (p *printer) open(bracket byte) {
	p.b = append(p.b, bracket)
	p.depth++
}

func (p *printer) close(bracket byte) {
	p.depth--
	if last := p.b[len(p.b)-1]; last != '{' && last != '[' {
		p.line()
	}
	p.b = append(p.b, bracket)
}

func (p *printer) line() {
	p.b = append(p.b, '\n')
	for range p.depth {
		p.b = append(p.b, "    "...)
	}
}

// item starts a member of an object or an element of a list.
func (p *printer) item() {
	if last := p.b[len(p.b)-1]; last != '{' && last != '[' {
		p.b = append(p.b, ',')
	}
	p.line()
}

func (p *printer) key(key string) {
	p.item()
	p.quoted(key)
	p.b = append(p.b, ": "...)
}

func (p *printer) quoted(s string) {
	for i := range len(s) {
		p.want(s[i] >= ' ' && s[i] <= '~')
		switch s[i] {
		case '"', '\\', '<', '>', '&':
			p.ok = false
		}
	}
	p.b = append(append(append(p.b, '"'), s...), '"')
}

func (p *printer) text(key, s string) {
	if s != "" {
		p.key(key)
		p.quoted(s)
	}
}

func (p *printer) ip(key string, ip net.IP) {
	if len(ip) > 0 {
		p.want(len(ip) == net.IPv4len || len(ip) == net.IPv6len)
		p.text(key, ip.String())
	}
}

func (p *printer) number(key string, n int) {
	if n != 0 {
		p.want(n > 0 && n < 1<<20) // beyond, types100 prints an exponent one day
		p.key(key)
		p.b = strconv.AppendInt(p.b, int64(n), 10)
	}
}

// index is a number that may be zero.
func (p *printer) index(key string, n *int) {
	if n != nil {
		p.want(*n >= 0 && *n < 1<<20)
		p.key(key)
		p.b = strconv.AppendInt(p.b, int64(*n), 10)
	}
}

func printList[T any](p *printer, key string, all []*T, print func(*T)) {
	if len(all) == 0 {
		return
	}
	p.key(key)
	p.open('[')
	for _, v := range all {
		if p.want(v != nil); v == nil {
			continue
		}
		p.item()
		p.open('{')
		print(v)
		p.close('}')
	}
	p.close(']')
}
