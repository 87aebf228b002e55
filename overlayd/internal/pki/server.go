package pki

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

const (
	serverLife = 7 * 24 * time.Hour // of a coordinator's certificate, which it issues itself
	serverAge  = 24 * time.Hour     // when it issues the next one
	maxAddrs   = 64                 // of this host, in one certificate
)

// serverCert is what this coordinator shows. It covers the names it was told, and
// every address of the host that a client connected to.
type serverCert struct {
	mu    sync.Mutex
	key   *ecdsa.PrivateKey
	addrs []string
	made  time.Time
	by    *authority
	cert  *tls.Certificate
}

// ServerConfig is how a coordinator speaks TLS. A client's certificate is asked
// for and proven to be its own; whether it is accepted is for PeerOf to say,
// which can say why not.
func (r *Registry) ServerConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"http/1.1"},
		ClientAuth: tls.RequestClientCert,
		// A ticket would save one signature, and bring back an old certificate.
		SessionTicketsDisabled: true,
		GetCertificate:         r.serverCertificate,
	}
}

// Client makes requests to the other coordinators, with the certificate that this
// one shows to its clients.
func (r *Registry) Client() *http.Client {
	return &http.Client{Transport: newTransport(
		func(host string, shown []*x509.Certificate) error {
			return verifyServer(host, shown, r.auth.Load().certs(), r.o.Now())
		},
		func() (*tls.Certificate, error) { return r.serverCertificate(nil) },
	)}
}

func (r *Registry) serverCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	s := &r.server
	s.mu.Lock()
	defer s.mu.Unlock()
	local := ""
	if hello != nil && hello.Conn != nil {
		if a, ok := hello.Conn.LocalAddr().(*net.TCPAddr); ok {
			local = a.AddrPort().Addr().Unmap().WithZone("").String()
		}
	}
	if local != "" && !slices.Contains(s.addrs, local) {
		if len(s.addrs) >= maxAddrs {
			s.addrs = s.addrs[1:]
		}
		s.addrs = append(s.addrs, local)
		s.cert = nil
	}
	// By the wall clock, as clients look at it: a coordinator that was started before its
	// clock was set, or whose clock was ahead for a moment, has a certificate of another time.
	now, by := r.o.Now().Round(0), r.auth.Load()
	if age := now.Sub(s.made); s.cert != nil && s.by == by && age > -backdate/2 && age < serverAge {
		return s.cert, nil
	}
	if s.key == nil {
		key, err := newKey()
		if err != nil {
			return nil, err
		}
		s.key = key
	}
	cert, err := by.issue(Identity{Role: RoleCoordinator, Name: hostname(), Instance: random(8)}, s.key.Public(), r.names(s.addrs), now, serverLife)
	if err != nil {
		return nil, err
	}
	s.cert = &tls.Certificate{Certificate: append([][]byte{cert.Raw}, by.chain()...), PrivateKey: s.key, Leaf: cert}
	s.made, s.by = now, by
	return s.cert, nil
}

func (r *Registry) names(addrs []string) []string {
	names := slices.Concat(r.o.Names, []string{hostname(), "localhost", "127.0.0.1", "::1"}, addrs)
	slices.Sort(names)
	return slices.Compact(names)
}

// hostname is something even where the host has no name.
func hostname() string {
	name, err := os.Hostname()
	if err != nil || CheckName(name) != nil {
		return "coordinator"
	}
	return name
}

// LocalNames reports what of a listen address can be a name in a certificate.
func LocalNames(listen string) []string {
	host, _, err := net.SplitHostPort(listen)
	if err != nil || host == "" {
		return nil
	}
	if ip, err := netip.ParseAddr(host); err == nil && ip.IsUnspecified() {
		return nil
	}
	return []string{host}
}
