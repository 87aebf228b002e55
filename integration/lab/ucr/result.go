package ucr

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
)

// Result is what the isolator understands of a plugin's output.
type Result struct {
	IP4, IP6 *IPConfig
	DNS      *DNS
}

// IPConfig is one family of it.
type IPConfig struct {
	IP, Gateway string
	Routes      []Route
}

// Route is one route.
type Route struct{ Dst, GW string }

// DNS is what the container's resolv.conf is made of.
type DNS struct {
	Nameservers, Search, Options []string
	Domain                       string
}

// Prefix is the address of an IPConfig that ParseResult has accepted; the zero
// Prefix if it is none.
func (c *IPConfig) Prefix() netip.Prefix {
	if c == nil {
		return netip.Prefix{}
	}
	p, _ := netip.ParsePrefix(c.IP)
	return p
}

// ParseResult parses as strictly as the isolator: exactly one JSON object. ip4,
// ip6 and dns must have the right types, case counts, null means absent, and
// anything else is ignored. ip4.ip must be a.b.c.d/len; ip6.ip is not looked at.
func ParseResult(b []byte) (Result, error) {
	o, err := parseObject(b)
	if err != nil {
		return Result{}, err
	}
	p := parser{}
	r := Result{IP4: p.ipConfig(o, "ip4"), IP6: p.ipConfig(o, "ip6"), DNS: p.dns(o)}
	if p.err == nil && r.IP4 != nil {
		p.err = checkIPv4(r.IP4.IP)
	}
	return r, p.err
}

// checkIPv4 is the isolator's parser for an IPv4 network.
func checkIPv4(s string) error {
	host, length, ok := strings.Cut(s, "/")
	if !ok {
		return fmt.Errorf("ip4.ip %q: unexpected number of '/'", s)
	}
	a, err := netip.ParseAddr(host)
	if err != nil || !a.Is4() {
		return fmt.Errorf("ip4.ip %q: %q is not an IPv4 address", s, host)
	}
	if n, err := strconv.ParseUint(length, 10, 8); err != nil || n > 32 {
		return fmt.Errorf("ip4.ip %q: %q is not a prefix length", s, length)
	}
	return nil
}

// parseObject reads one JSON object and nothing but white space around it.
func parseObject(b []byte) (map[string]any, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	var o map[string]any
	if err := dec.Decode(&o); err != nil {
		return nil, err
	}
	if o == nil {
		return nil, errors.New("null is not an object")
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something follows the JSON object")
	}
	return o, nil
}

// A parser turns objects into messages and remembers the first thing wrong.
type parser struct{ err error }

func (p *parser) wrong(key, want string, v any) {
	if p.err == nil {
		p.err = fmt.Errorf("%s: want %s, got %v", key, want, v)
	}
}

func (p *parser) object(o map[string]any, key string) (map[string]any, bool) {
	v := o[key]
	if v == nil {
		return nil, false
	}
	m, ok := v.(map[string]any)
	if !ok {
		p.wrong(key, "an object", v)
	}
	return m, ok
}

func (p *parser) string(o map[string]any, key string) (string, bool) {
	v := o[key]
	if v == nil {
		return "", false
	}
	s, ok := v.(string)
	if !ok {
		p.wrong(key, "a string", v)
	}
	return s, ok
}

func (p *parser) requiredString(o map[string]any, key string) string {
	s, ok := p.string(o, key)
	if !ok {
		p.wrong(key, "a string, which is required", o[key])
	}
	return s
}

func (p *parser) list(o map[string]any, key string) []any {
	v := o[key]
	if v == nil {
		return nil
	}
	l, ok := v.([]any)
	if !ok {
		p.wrong(key, "an array", v)
	}
	return l
}

func (p *parser) strings(o map[string]any, key string) (out []string) {
	for _, v := range p.list(o, key) {
		s, ok := v.(string)
		if !ok {
			p.wrong(key, "an array of strings", v)
		}
		out = append(out, s)
	}
	return out
}

func (p *parser) ipConfig(o map[string]any, key string) *IPConfig {
	m, ok := p.object(o, key)
	if !ok {
		return nil
	}
	c := &IPConfig{IP: p.requiredString(m, "ip"), Routes: p.routes(m)}
	c.Gateway, _ = p.string(m, "gateway")
	return c
}

func (p *parser) routes(o map[string]any) (out []Route) {
	for _, v := range p.list(o, "routes") {
		m, ok := v.(map[string]any)
		if !ok {
			p.wrong("routes", "an array of objects", v)
			continue
		}
		r := Route{Dst: p.requiredString(m, "dst")}
		r.GW, _ = p.string(m, "gw")
		out = append(out, r)
	}
	return out
}

func (p *parser) dns(o map[string]any) *DNS {
	m, ok := p.object(o, "dns")
	if !ok {
		return nil
	}
	d := &DNS{Nameservers: p.strings(m, "nameservers"), Search: p.strings(m, "search"), Options: p.strings(m, "options")}
	d.Domain, _ = p.string(m, "domain")
	return d
}
