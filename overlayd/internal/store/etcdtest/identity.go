package etcdtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Identity is a certificate and its key, as files.
type Identity struct{ Cert, Key string }

// CA signs certificates for members and clients of one cluster.
type CA struct {
	File string // its certificate

	t    testing.TB
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewCA makes a CA whose files go with the test.
func NewCA(t testing.TB) *CA {
	t.Helper()
	ca := &CA{t: t, dir: t.TempDir()}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "who runs this etcd"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	var own Identity
	own, ca.cert, ca.key = ca.write("ca", template)
	ca.File = own.Cert
	return ca
}

// Issue writes a certificate for an address, good until a time, and its key. One of
// the same name is written over.
func (ca *CA) Issue(name, ip string, until time.Time) Identity {
	ca.t.Helper()
	id, _, _ := ca.write(name, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotAfter: until, IPAddresses: []net.IP{net.ParseIP(ip)},
		KeyUsage: x509.KeyUsageDigitalSignature,
		// A member of etcd is a client too, of others and of itself.
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	return id
}

func (ca *CA) write(name string, template *x509.Certificate) (Identity, *x509.Certificate, *ecdsa.PrivateKey) {
	ca.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ca.must(err)
	template.SerialNumber, template.NotBefore = big.NewInt(time.Now().UnixNano()), time.Now().Add(-2*time.Hour)
	signer, signerKey := ca.cert, ca.key
	if signer == nil { // it is the CA itself
		signer, signerKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer, key.Public(), signerKey)
	ca.must(err)
	cert, err := x509.ParseCertificate(der)
	ca.must(err)
	private, err := x509.MarshalECPrivateKey(key)
	ca.must(err)
	id := Identity{Cert: filepath.Join(ca.dir, name+".crt"), Key: filepath.Join(ca.dir, name+".key")}
	for file, block := range map[string]*pem.Block{id.Cert: {Type: "CERTIFICATE", Bytes: der}, id.Key: {Type: "EC PRIVATE KEY", Bytes: private}} {
		ca.must(os.WriteFile(file, pem.EncodeToMemory(block), 0o600))
	}
	return id, cert, key
}

func (ca *CA) must(err error) {
	ca.t.Helper()
	if err != nil {
		ca.t.Fatal(err)
	}
}

// arguments are what has a member speak TLS only, and demand certificates of
// clients and of other members. It keeps those that it has.
func (ca *CA) arguments(m *Member) []string {
	if m.server == (Identity{}) {
		m.server = ca.Issue(m.Name, m.IP, time.Now().Add(time.Hour))
		m.peer = ca.Issue(m.Name+"-peer", m.IP, time.Now().Add(time.Hour))
	}
	return []string{
		"--cert-file", m.server.Cert, "--key-file", m.server.Key, "--trusted-ca-file", ca.File, "--client-cert-auth",
		"--peer-cert-file", m.peer.Cert, "--peer-key-file", m.peer.Key, "--peer-trusted-ca-file", ca.File, "--peer-client-cert-auth",
	}
}
