package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"time"
)

// root is one CA with its key.
type root struct {
	cert  *x509.Certificate
	cross *x509.Certificate // the same key, certified by the root before; nil: there was none
	key   crypto.Signer
	until time.Time // trusted until then; zero: it is the one that issues
}

// authority is the roots of the cluster, oldest first. The last one issues. It
// never changes; a rotation makes another one.
type authority struct {
	domain string
	roots  []*root
	pool   *x509.CertPool // the roots
	bundle string         // id of the roots, as in HeaderBundle

	leaseKeys [][]byte // see leases.go
}

func newAuthority(domain string, roots []*root) *authority {
	a := &authority{domain: domain, roots: roots}
	a.pool, a.bundle = poolOf(a.certs()...), bundleID(a.certs())
	return a
}

func (a *authority) issuer() *root { return a.roots[len(a.roots)-1] }

// certs are what clients trust.
func (a *authority) certs() (out []*x509.Certificate) {
	for _, r := range a.roots {
		out = append(out, r.cert)
	}
	return out
}

// bundleID changes whenever the trusted roots do.
func bundleID(certs []*x509.Certificate) string {
	h := sha256.New()
	for _, c := range certs {
		h.Write(c.Raw)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

func poolOf(certs ...*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AddCert(c)
	}
	return p
}

func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b) // never fails
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b)
}

// newRoot makes a CA that certifies itself.
func newRoot(domain string, now time.Time) (*root, error) {
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	t := rootTemplate(pkix.Name{Organization: []string{"overlay"}, CommonName: "overlay CA " + domain + " " + now.UTC().Format("2006-01-02 15:04:05")}, now)
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make the CA: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	return &root{cert: cert, key: key}, err
}

func rootTemplate(subject pkix.Name, now time.Time) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: serial(), Subject: subject,
		NotBefore: now.Add(-backdate), NotAfter: now.Add(rootLife),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
	}
}

// follow has the root before certify the key of r, so that whoever knows only
// that one trusts what r issues.
func (r *root) follow(before *root, now time.Time) error {
	t := rootTemplate(r.cert.Subject, now)
	t.SubjectKeyId = r.cert.SubjectKeyId
	if t.NotAfter.After(before.cert.NotAfter) {
		t.NotAfter = before.cert.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, t, before.cert, r.cert.PublicKey, before.key)
	if err != nil {
		return fmt.Errorf("certify the new CA by the one before: %w", err)
	}
	r.cross, err = x509.ParseCertificate(der)
	return err
}

// issue certifies a key. Nothing of what asked for it but the key is used. Names
// are for a server; without them the certificate is good for a client alone.
func (a *authority) issue(who Identity, key crypto.PublicKey, names []string, now time.Time, life time.Duration) (*x509.Certificate, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	who.Domain = a.domain
	r := a.issuer()
	t := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{Organization: []string{"overlay"}, OrganizationalUnit: []string{string(who.Role)}, CommonName: clip(who.Name)},
		URIs:         []*url.URL{who.uri()},
		NotBefore:    now.Add(-backdate), NotAfter: now.Add(life),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	if t.NotAfter.After(r.cert.NotAfter) {
		t.NotAfter = r.cert.NotAfter
	}
	if t.NotBefore.Before(r.cert.NotBefore) {
		t.NotBefore = r.cert.NotBefore
	}
	if len(names) > 0 {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	for _, n := range names {
		if ip, err := netip.ParseAddr(n); err == nil {
			t.IPAddresses = append(t.IPAddresses, net.IP(ip.Unmap().WithZone("").AsSlice()))
		} else {
			t.DNSNames = append(t.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, t, r.cert, key, r.key)
	if err != nil {
		return nil, fmt.Errorf("issue a certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

// checkKey refuses keys that are weak, or slow to check.
func checkKey(key crypto.PublicKey) error {
	ec, ok := key.(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("a key of type %T, want ECDSA P-256", key)
	}
	if bits := ec.Curve.Params().BitSize; bits != 256 {
		return fmt.Errorf("an ECDSA key of %d bits, want P-256", bits)
	}
	return nil
}

// clip bounds a common name, which has at most 64 characters.
func clip(s string) string { return s[:min(len(s), 64)] }

// chain is what a server shows behind its own certificate: enough for whoever
// knows any of the roots, or the hash of one.
func (a *authority) chain() (out [][]byte) {
	for i := len(a.roots) - 1; i >= 0; i-- {
		r := a.roots[i]
		if i > 0 && r.cross != nil {
			out = append(out, r.cross.Raw)
		}
		out = append(out, r.cert.Raw)
	}
	return out
}

// verify says who a client's certificate is of, if one of the roots says so.
func (a *authority) verify(cert *x509.Certificate, now time.Time) (Identity, error) {
	_, err := cert.Verify(x509.VerifyOptions{
		Roots: a.pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return Identity{}, a.refusal(cert, now, err)
	}
	who, err := identityOf(cert)
	if err == nil && who.Domain != a.domain {
		err = fmt.Errorf("the certificate is one of cluster %s, and this is cluster %s", who.Domain, a.domain)
	}
	if err != nil {
		return Identity{}, &Refused{ReasonForeign, err.Error() + "; join this cluster with a token of its own"}
	}
	return who, nil
}

func (a *authority) refusal(cert *x509.Certificate, now time.Time, err error) error {
	const layout = time.RFC3339
	now = now.UTC()
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && now.Before(cert.NotBefore):
		return &Refused{ReasonClock, fmt.Sprintf("the certificate is valid from %s on, and the clock of this coordinator says %s; set the clocks right",
			cert.NotBefore.UTC().Format(layout), now.Format(layout))}
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return &Refused{ReasonExpired, fmt.Sprintf("the certificate expired at %s, and the clock of this coordinator says %s; if the clocks are right, join again with a new token (overlayctl token create)",
			cert.NotAfter.UTC().Format(layout), now.Format(layout))}
	}
	return &Refused{ReasonForeign, fmt.Sprintf("the certificate is of another CA than this cluster's (%s): %v; join this cluster with a token of its own", fingerprint(a.issuer().cert), err)}
}
