package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"overlayd.internal/overlay/conf"
)

// Files of a member.
const (
	identityFile = "identity.pem" // private key and certificate
	caFile       = "ca.pem"       // the CAs to trust
	joiningFile  = "joining.pem"  // private key, until the answer to the join has come
)

// Dir is the directory of keys in a state directory.
const Dir = "pki"

// readHeld returns nil when there is nothing.
func readHeld(dir string) (*held, error) {
	path := filepath.Join(dir, identityFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(filepath.Join(dir, caFile))
	if err != nil {
		return nil, err
	}
	h, err := parseHeld(text, ca)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; put the file back, or remove the directory and join again with a new token", path, err)
	}
	return h, nil
}

// parseHeld reads a key with its certificate, and the CAs.
func parseHeld(text, ca []byte) (*held, error) {
	h := &held{text: text}
	var err error
	if h.cert, err = tls.X509KeyPair(text, text); err != nil {
		return nil, err
	}
	if h.leaf, err = x509.ParseCertificate(h.cert.Certificate[0]); err != nil {
		return nil, err
	}
	h.cert.Leaf = h.leaf
	if h.who, err = identityOf(h.leaf); err != nil {
		return nil, err
	}
	if h.roots, err = decodeCerts(ca); err != nil {
		return nil, fmt.Errorf("%s: %w", caFile, err)
	}
	h.bundle = bundleID(h.roots)
	return h, nil
}

// writeHeld writes the CAs first: those of a renewal trust all that went before.
func writeHeld(dir string, text, ca []byte) error {
	if err := openDir(dir); err != nil {
		return err
	}
	if err := conf.WriteFile(filepath.Join(dir, caFile), ca, 0o600, ""); err != nil {
		return err
	}
	return conf.WriteFile(filepath.Join(dir, identityFile), text, 0o600, "")
}

// AnonymousClient makes requests to coordinators of the given CAs, PEM, as nobody.
func AnonymousClient(ca []byte) (*http.Client, error) {
	roots, err := decodeCerts(ca)
	if err != nil {
		return nil, err
	}
	m := &Member{o: MemberOptions{Now: time.Now}}
	return &http.Client{Transport: m.newTransport(func(host string, shown []*x509.Certificate) error {
		return verifyServer(host, shown, roots, time.Now())
	})}, nil
}
