package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// etcdIdentity is a certificate of the lab's etcd and its key, as files.
type etcdIdentity struct{ cert, key string }

func (l *Lab) etcdIdentity(name string) etcdIdentity {
	return etcdIdentity{filepath.Join(l.etcdDir(), name+".crt"), filepath.Join(l.etcdDir(), name+".key")}
}

// makeEtcdIdentities writes those of a CA, of the member on a node, and of a client.
func (l *Lab) makeEtcdIdentities(n *Node) (ca etcdIdentity, err error) {
	if err := os.MkdirAll(l.etcdDir(), 0o700); err != nil {
		return ca, err
	}
	now := time.Now()
	signer := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "etcd of " + l.Name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(30 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return ca, err
	}
	ca = l.etcdIdentity("ca")
	if err := ca.write(signer, key, signer, key); err != nil {
		return ca, err
	}
	for i, name := range []string{"member", "client"} {
		own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return ca, err
		}
		err = l.etcdIdentity(name).write(&x509.Certificate{
			SerialNumber: big.NewInt(int64(2 + i)), Subject: pkix.Name{CommonName: name}, NotBefore: signer.NotBefore, NotAfter: signer.NotAfter,
			IPAddresses: []net.IP{n.Underlay().AsSlice()}, KeyUsage: x509.KeyUsageDigitalSignature,
			// A member is a client of itself.
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}, own, signer, key)
		if err != nil {
			return ca, err
		}
	}
	return ca, nil
}

func (i etcdIdentity) write(cert *x509.Certificate, key *ecdsa.PrivateKey, signer *x509.Certificate, signerKey *ecdsa.PrivateKey) error {
	der, err := x509.CreateCertificate(rand.Reader, cert, signer, key.Public(), signerKey)
	if err != nil {
		return err
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(i.cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(i.key, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}), 0o600))
}
