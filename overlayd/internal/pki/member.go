package pki

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	randv2 "math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

const (
	// exchangeTimeout bounds a join or a renewal.
	exchangeTimeout = 10 * time.Second
	// maxExchange bounds the answer, in bytes.
	maxExchange = 256 << 10
	// spread is within what time all agents learn of a new CA.
	spread = 30 * time.Second
	// retryRenewal is the pause after a renewal that failed.
	retryRenewal = time.Minute
)

// MemberOptions are what a Member is made of.
type MemberOptions struct {
	Dir  string // of key and certificates
	Name string // agent id, or of a person; may be set later, by SetName
	// Token returns the join token, or "" where there is none. It is called when
	// one is needed.
	Token func() (string, error)
	// CAChanged is called with the CAs, PEM, at the start and whenever they change;
	// it may be nil.
	CAChanged func([]byte)
	Log       *slog.Logger
	Now       func() time.Time
}

// Member is the identity of a host or a person: it joins with a token when it has
// to, renews its certificate in time, and learns of a new CA. All of that happens
// when a request is made, so a Member has no goroutine of its own. It is safe for
// concurrent use.
type Member struct {
	o         MemberOptions
	transport *http.Transport

	exchange chan struct{} // holds a token while one joins or renews

	mu      sync.Mutex
	name    string
	held    *held     // nil: not joined
	renewAt time.Time // of held
	tried   string    // token that was used or refused
}

// held is what a member has once it has joined. It never changes.
type held struct {
	who    Identity
	cert   tls.Certificate
	leaf   *x509.Certificate
	roots  []*x509.Certificate
	bundle string
	text   []byte // key and certificate, PEM
}

// OpenMember reads what is in the directory, which may be nothing.
func OpenMember(o MemberOptions) (*Member, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	m := &Member{o: o, name: o.Name, exchange: make(chan struct{}, 1)}
	m.transport = m.newTransport(func(host string, shown []*x509.Certificate) error {
		h := m.current()
		if h == nil {
			return errors.New("this host has not joined")
		}
		return verifyServer(host, shown, h.roots, m.o.Now())
	})
	h, err := readHeld(o.Dir)
	if err != nil {
		return nil, err
	}
	if h != nil {
		m.set(h)
	}
	return m, nil
}

// newTransport makes connections whose server is verified, and shows the
// member's certificate. It does not heed http_proxy: a proxy would see the
// cluster's secrets, if it let TLS through at all.
func (m *Member) newTransport(verify func(host string, shown []*x509.Certificate) error) *http.Transport {
	return newTransport(verify, func() (*tls.Certificate, error) {
		if h := m.current(); h != nil {
			return &h.cert, nil
		}
		return &tls.Certificate{}, nil
	})
}

func newTransport(verify func(host string, shown []*x509.Certificate) error, show func() (*tls.Certificate, error)) *http.Transport {
	dialer := &net.Dialer{Timeout: 3 * time.Second, KeepAlive: 15 * time.Second}
	return &http.Transport{
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     90 * time.Second,
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			host, _, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			host, _, _ = strings.Cut(host, "%") // certificates know no zones
			raw, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			conn := tls.Client(raw, &tls.Config{
				MinVersion: tls.VersionTLS13,
				ServerName: host,
				NextProtos: []string{"http/1.1"},
				// VerifyConnection does it, with the CAs of the moment.
				InsecureSkipVerify:   true,
				VerifyConnection:     func(state tls.ConnectionState) error { return verify(host, state.PeerCertificates) },
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return show() },
			})
			shake, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			if err := conn.HandshakeContext(shake); err != nil {
				raw.Close()
				return nil, explainHandshake(addr, err)
			}
			return conn, nil
		},
	}
}

func explainHandshake(addr string, err error) error {
	var record tls.RecordHeaderError
	if errors.As(err, &record) && bytes.HasPrefix(record.RecordHeader[:], []byte("HTTP")) {
		return fmt.Errorf("the coordinator at %s speaks plain HTTP without any identity (--insecure), and this side does not talk to such a one; start the coordinator without --insecure", addr)
	}
	return err
}

func (m *Member) current() *held {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held
}

// set takes over an identity and decides when to renew it: all agents of a
// cluster that was made in a day do not come back on the same one.
func (m *Member) set(h *held) {
	issued := h.leaf.NotBefore.Add(backdate)
	life := h.leaf.NotAfter.Sub(issued)
	m.mu.Lock()
	m.held = h
	m.renewAt = issued.Add(life/2 + randv2.N(life*3/10+1))
	m.mu.Unlock()
	if m.o.CAChanged != nil {
		m.o.CAChanged(encodeCerts(h.roots...))
	}
}

// SetName says who the member is. A certificate of somebody else is an error: the
// state directory of another host was copied, or its agent id changed.
func (m *Member) SetName(name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.name = name
	if m.held != nil && m.held.who.Name != name {
		return fmt.Errorf("%s has the certificate of %s, and this is %s; remove the directory and join again with a new token, or put the name back", m.o.Dir, m.held.who, name)
	}
	return nil
}

// Rewrite writes key and certificates anew, after somebody removed them.
func (m *Member) Rewrite() error {
	h := m.current()
	if h == nil {
		return nil
	}
	return writeHeld(m.o.Dir, h.text, encodeCerts(h.roots...))
}

// Joined reports whether there is a certificate, and who it is of.
func (m *Member) Joined() (Identity, bool) {
	if h := m.current(); h != nil {
		return h.who, true
	}
	return Identity{}, false
}

// Client makes requests as the member. It joins and renews on the way.
func (m *Member) Client() *http.Client { return &http.Client{Transport: m} }

// CloseIdleConnections is for http.Client.
func (m *Member) CloseIdleConnections() { m.transport.CloseIdleConnections() }

// RoundTrip is that of http.RoundTripper.
func (m *Member) RoundTrip(req *http.Request) (*http.Response, error) {
	base := "https://" + req.URL.Host
	if req.URL.Scheme != "https" {
		return nil, fmt.Errorf("the coordinator at %s has no identity, and this side does not talk to such a one: its address has to begin with https://", req.URL.Host)
	}
	if m.current() == nil {
		if err := m.join(req.Context(), base, nil); err != nil {
			return nil, err
		}
	}
	if err := m.renewInTime(req.Context(), base); err != nil {
		m.o.Log.Warn("certificate not renewed; trying again", logkey.URL, base, logkey.Err, err)
	}
	resp, err := m.transport.RoundTrip(req)
	if err != nil {
		if foreign := new(foreignServer); errors.As(err, &foreign) {
			return nil, m.joinAnew(req.Context(), base, foreign)
		}
		return nil, err
	}
	if why := resp.Header.Get(api.HeaderRefused); why != "" && why != ReasonClock && m.newToken() != "" {
		resp.Body.Close()
		return nil, m.joinAnew(req.Context(), base, fmt.Errorf("the certificate of this host is not accepted: %s", why))
	}
	m.learn(resp.Header.Get(api.HeaderBundle))
	return resp, nil
}

// learn renews soon when the coordinator trusts other CAs than we know of.
func (m *Member) learn(bundle string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if bundle == "" || m.held == nil || bundle == m.held.bundle {
		return
	}
	if soon := m.o.Now().Add(randv2.N(spread)); soon.Before(m.renewAt) {
		m.renewAt = soon
	}
}

// newToken is the token, unless it has been tried.
func (m *Member) newToken() string {
	if m.o.Token == nil {
		return ""
	}
	t, err := m.o.Token()
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil || t == m.tried {
		return ""
	}
	return t
}

// joinAnew joins with a token that was not tried before, for the certificate that
// we have is no longer good, or returns why that is.
func (m *Member) joinAnew(ctx context.Context, base string, why error) error {
	if m.newToken() == "" {
		return why
	}
	if err := m.join(ctx, base, m.current()); err != nil {
		return fmt.Errorf("%w; joining again: %w", why, err)
	}
	return errors.New("joined again; the next attempt uses the new certificate")
}

// lock keeps other exchanges out until unlock.
func (m *Member) lock(ctx context.Context) error {
	select {
	case m.exchange <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (m *Member) unlock() { <-m.exchange }
