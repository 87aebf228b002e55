package pki

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"sync"
	"time"
)

// connections are those whose client has shown a certificate of ours.
type connections struct {
	mu   *sync.Mutex
	open map[net.Conn]*Peer
}

func newConnections() connections {
	return connections{mu: &sync.Mutex{}, open: map[net.Conn]*Peer{}}
}

// Peer is who is at the other end of one connection.
type Peer struct {
	registry *Registry
	conn     net.Conn

	once    sync.Once
	cert    *x509.Certificate // nil: none was shown
	who     Identity
	refused error       // a *Refused
	end     *time.Timer // closes the connection when the certificate expires
}

type peerKey struct{}

// ConnContext has PeerOf find who is at the other end of a connection.
func (r *Registry) ConnContext(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, &Peer{registry: r, conn: c})
}

// ConnState forgets connections that have ended.
func (r *Registry) ConnState(c net.Conn, state http.ConnState) {
	if state != http.StateClosed && state != http.StateHijacked {
		return
	}
	r.conns.forget(c)
}

func (c connections) forget(conn net.Conn) {
	c.mu.Lock()
	p := c.open[conn]
	delete(c.open, conn)
	c.mu.Unlock()
	if p != nil {
		p.end.Stop()
	}
}

// PeerOf says who sent a request over TLS. The certificate is nil when none was
// shown; the error is a *Refused when it is not accepted. The certificate is
// verified once for a connection, whether it is still accepted each time.
func PeerOf(req *http.Request) (cert *x509.Certificate, who Identity, err error) {
	p, _ := req.Context().Value(peerKey{}).(*Peer)
	if p == nil || req.TLS == nil {
		return nil, Identity{}, nil
	}
	p.once.Do(func() { p.identify(req.TLS) })
	if p.cert == nil || p.refused != nil {
		return p.cert, Identity{}, p.refused
	}
	return p.cert, p.who, p.registry.stillAccepted(p)
}

func (p *Peer) identify(state *tls.ConnectionState) {
	if len(state.PeerCertificates) == 0 {
		return
	}
	r := p.registry
	p.cert = state.PeerCertificates[0]
	if p.who, p.refused = r.auth.Load().verify(p.cert, r.o.Now()); p.refused != nil {
		return
	}
	r.conns.mu.Lock()
	r.conns.open[p.conn] = p
	p.end = time.AfterFunc(p.cert.NotAfter.Sub(r.o.Now()), func() { p.conn.Close() })
	r.conns.mu.Unlock()
	if r.accepted(p.who) != nil {
		// Every request is refused anyway, but for the one that joins anew, and that
		// has to be answered.
		r.conns.forget(p.conn)
	}
}

// stillAccepted asks again what may have changed since the connection began.
func (r *Registry) stillAccepted(p *Peer) error {
	if r.o.Now().After(p.cert.NotAfter) || !r.auth.Load().issued(p.cert) {
		_, err := r.auth.Load().verify(p.cert, r.o.Now())
		if err != nil {
			return err
		}
	}
	return r.accepted(p.who)
}

// issued reports whether one of the roots has issued a certificate that was
// verified before.
func (a *authority) issued(cert *x509.Certificate) bool {
	for _, r := range a.roots {
		if string(r.cert.SubjectKeyId) == string(cert.AuthorityKeyId) && string(r.cert.RawSubject) == string(cert.RawIssuer) {
			return true
		}
	}
	return false
}

// check closes every connection that is no longer accepted. Whoever comes again
// learns why.
func (c connections) check(accepted func(*Peer) error) {
	c.checkThose(func(*Peer) bool { return true }, accepted)
}

func (c connections) checkOne(role Role, name string, accepted func(*Peer) error) {
	c.checkThose(func(p *Peer) bool { return p.who.Role == role && p.who.Name == name }, accepted)
}

func (c connections) checkThose(those func(*Peer) bool, accepted func(*Peer) error) {
	c.mu.Lock()
	var over []*Peer
	for _, p := range c.open {
		if those(p) && accepted(p) != nil {
			over = append(over, p)
		}
	}
	c.mu.Unlock()
	for _, p := range over {
		p.conn.Close()
	}
}
