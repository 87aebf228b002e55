package coordinator

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// A lease is encoded twice for each registration: as it is signed, and as it is
// answered, with what was signed inside. When a cluster joins at once that is by
// encoding/json a tenth of a registration. So it is encoded once, by hand, for both;
// what comes out is what encoding/json makes of it.

// Register is register for tests, of other packages as well, which want a lease and not
// its text. No program calls it: an agent's request comes by HTTP.
func (c *Coordinator) Register(ctx context.Context, req api.RegisterRequest) (l conf.Lease, err error) {
	text, err := c.register(ctx, &req)
	if err != nil {
		return conf.Lease{}, err
	}
	if err := json.Unmarshal(text, &l); err != nil {
		return conf.Lease{}, fmt.Errorf("read the lease of agent %s: %w", req.AgentID, err)
	}
	return l, nil
}

// claiming is a lease as it is signed: with the claim on what is in it, where that is
// not its epoch.
type claiming struct {
	conf.Lease
	Claim uint64 `json:"claim,omitempty"`
}

// answerLease is what an agent gets that was granted what the plan says: its lease,
// with what it shows with every registration from then on, so that it can be adopted
// when the store is lost.
func (c *Coordinator) answerLease(p *plan, req *api.RegisterRequest, a *agent) []byte {
	l := c.leaseFor(p.network, req, a, p.missing)
	claim := p.claim
	if claim == l.Epoch {
		claim = 0
	}
	sign := func(string) [][]byte { return nil }
	if c.identity != nil {
		sign = c.identity.SignLease
	}
	return appendSignedLease(p.network, &l, claim, p.second, sign)
}

// leaseSize is what most leases take in JSON, and signatures of two keys.
const leaseSize = 640

// appendSignedLease is the answer with a lease: what is signed, which is all but the
// reason for which there is no second agent IP, and beside it the same as a text.
func appendSignedLease(n *network, l *conf.Lease, claim uint64, second string, sign func(string) [][]byte) []byte {
	text := appendLease(make([]byte, 0, leaseSize), n, l)
	open := len(text)
	if claim != 0 {
		text = strconv.AppendUint(append(text, `,"claim":`...), claim, 10)
	}
	text = append(text, '}')
	signed := string(text)
	b := append(make([]byte, 0, 2*len(text)+len(text)/2+leaseSize/4), text[:open]...)
	if second != "" {
		b = appendText(append(b, `,"second_error":`...), second)
	}
	b = appendEscaped(append(b, `,"signed":{"lease":"`...), signed)
	b = append(b, '"')
	if signatures := sign(signed); len(signatures) > 0 {
		b = append(b, `,"signatures":[`...)
		for i, s := range signatures {
			if i > 0 {
				b = append(b, ',')
			}
			b = append(base64.StdEncoding.AppendEncode(append(b, '"'), s), '"')
		}
		b = append(b, ']')
	}
	return append(b, "}}\n"...)
}

// appendLease appends a lease that is under a network, without what is not signed and
// without its end.
func appendLease(b []byte, n *network, l *conf.Lease) []byte {
	b = appendText(append(b, `{"cluster_id":`...), l.ClusterID)
	b = appendText(append(b, `,"agent_id":`...), l.AgentID)
	b = appendAddrText(append(b, `,"agent_ip":`...), l.AgentIP)
	b = strconv.AppendUint(append(b, `,"epoch":`...), l.Epoch, 10)
	b = strconv.AppendInt(append(b, `,"term_seconds":`...), int64(l.TermSeconds), 10)
	b = append(b, `,"bridges":`...)
	b = appendList(b, l.Bridges, func(b []byte, h *conf.Half) []byte { return appendText(b, string(*h)) })
	b = append(appendPrefix(append(b, `,"vtep":{"ip":"`...), l.VTEP.IP), '"')
	b = appendSubnet(b, `,"ip6":"`, l.VTEP.IP6)
	b = append(l.VTEP.MAC.Append(append(b, `,"mac":"`...)), '"')
	b = appendNumber(b, `,"mtu":`, l.VTEP.MTU)
	b = append(b, `},"overlays":`...)
	b = appendList(b, l.Grants, func(b []byte, g *conf.Grant) []byte { return appendGrant(b, n, g) })
	b = appendUnderlay(b, &l.Underlay)
	if len(l.TakenDown) > 0 {
		b = append(b, `,"taken_down":`...)
		b = appendList(b, l.TakenDown, func(b []byte, name *string) []byte { return appendText(b, *name) })
	}
	return b
}

func appendGrant(b []byte, n *network, g *conf.Grant) []byte {
	b = append(append(b, `{"overlay":`...), n.overlayText(&g.Overlay)...)
	b = appendSubnet(b, `,"subnet":"`, g.Subnet)
	b = appendSubnet(b, `,"subnet6":"`, g.Subnet6)
	if len(g.Blocks) > 0 {
		b = append(b, `,"blocks":`...)
		b = appendList(b, g.Blocks, appendBlock)
	}
	if g.Error != "" {
		b = appendText(append(b, `,"error":`...), g.Error)
	}
	return append(b, '}')
}

// overlayText is an overlay of the network in JSON.
func (n *network) overlayText(o *conf.Overlay) []byte {
	if text, ok := n.json[overlayKey{o.Name, o.Isolation}]; ok {
		return text
	}
	return encode(o)
}

func appendBlock(b []byte, x *conf.Block) []byte {
	if x.Subnet == (netip.Prefix{}) {
		return append(appendSubnet(append(b, '{'), `"subnet6":"`, x.Subnet6), '}')
	}
	b = appendSubnet(append(b, '{'), `"subnet":"`, x.Subnet)
	return append(appendSubnet(b, `,"subnet6":"`, x.Subnet6), '}')
}

// appendUnderlay appends the fields that are there.
func appendUnderlay(b []byte, u *conf.Underlay) []byte {
	if u.Direct {
		b = append(b, `,"direct":true`...)
	}
	b = appendNumber(b, `,"mtu":`, u.MTU)
	if u.SecondIP != (netip.Addr{}) {
		b = appendAddrText(append(b, `,"second_ip":`...), u.SecondIP)
	}
	b = appendNumber(b, `,"second_mtu":`, u.SecondMTU)
	if u.TwoFamilies {
		b = append(b, `,"two_families":true`...)
	}
	return b
}

func appendList[T any](b []byte, list []T, element func([]byte, *T) []byte) []byte {
	if list == nil {
		return append(b, "null"...)
	}
	b = append(b, '[')
	for i := range list {
		if i > 0 {
			b = append(b, ',')
		}
		b = element(b, &list[i])
	}
	return append(b, ']')
}

// appendSubnet appends a key, which ends with a quote, and a subnet, where there is one.
func appendSubnet(b []byte, key string, p netip.Prefix) []byte {
	if p == (netip.Prefix{}) {
		return b
	}
	return append(appendPrefix(append(b, key...), p), '"')
}

// appendNumber appends a key and a number, where that is not 0.
func appendNumber(b []byte, key string, n int) []byte {
	if n == 0 {
		return b
	}
	return strconv.AppendInt(append(b, key...), int64(n), 10)
}

// appendText appends a text and its quotes.
func appendText(b []byte, s string) []byte {
	if !plain(s) {
		return append(b, encode(s)...)
	}
	return append(append(append(b, '"'), s...), '"')
}

// appendAddrText appends an address and its quotes. A zone may be any text.
func appendAddrText(b []byte, a netip.Addr) []byte {
	if a.Zone() != "" {
		return append(b, encode(a)...)
	}
	return append(appendAddr(append(b, '"'), a), '"')
}

// appendEscaped appends a text that is JSON itself, as it stands in JSON between
// quotes. There is nothing else to be escaped in it but quotes and backslashes: what
// else there was is escaped already.
func appendEscaped(b []byte, s string) []byte {
	from := 0
	for i := range len(s) {
		if c := s[i]; c == '"' || c == '\\' {
			b = append(append(append(b, s[from:i]...), '\\'), c)
			from = i + 1
		}
	}
	return append(b, s[from:]...)
}
