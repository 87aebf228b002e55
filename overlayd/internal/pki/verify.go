package pki

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// verifyServer says why what a server shows is not the certificate of a
// coordinator that a client may talk to, and what to do.
func verifyServer(host string, shown, roots []*x509.Certificate, now time.Time) error {
	if len(shown) == 0 {
		return fmt.Errorf("the coordinator at %s shows no certificate", host)
	}
	leaf := shown[0]
	options := x509.VerifyOptions{
		Roots: poolOf(roots...), Intermediates: poolOf(shown[1:]...), CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if _, err := leaf.Verify(options); err != nil {
		return explainServer(host, leaf, options, now, err)
	}
	who, err := identityOf(leaf)
	if err == nil && who.Role != RoleCoordinator {
		err = fmt.Errorf("it is that of %s", who)
	}
	if err != nil {
		return fmt.Errorf("the certificate that %s shows is not that of a coordinator: %w", host, err)
	}
	if err := leaf.VerifyHostname(host); err != nil {
		return fmt.Errorf("the coordinator's certificate is not for %s: %w; start the coordinator with --advertise %s, or use one of those names", host, err, host)
	}
	return nil
}

func explainServer(host string, leaf *x509.Certificate, options x509.VerifyOptions, now time.Time, err error) error {
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
		options.CurrentTime = leaf.NotBefore.Add(backdate)
		if _, other := leaf.Verify(options); other == nil {
			return fmt.Errorf("the clocks of this host and of the coordinator at %s differ: here it is %s, and its certificate, which it makes anew every day, is valid from %s to %s; set the clocks right",
				host, now.UTC().Format(time.RFC3339), leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339))
		} else {
			err = other
		}
	}
	return &foreignServer{host: host, err: err}
}

// foreignServer is a server whose certificate is of a CA that is not known.
type foreignServer struct {
	host string
	err  error
}

func (f *foreignServer) Error() string {
	return fmt.Sprintf("the certificate of the coordinator at %s is of another CA than the one this host joined: it is one of another cluster, or the cluster has a new CA that this host missed (%v); "+
		"check the address, or join again with a new token (overlayctl token create, then --join-token)", f.host, f.err)
}

func (f *foreignServer) Unwrap() error { return f.err }

// pinnedRoot is the certificate among those shown whose key has a hash.
func pinnedRoot(host string, shown []*x509.Certificate, pin [sha256.Size]byte) (*x509.Certificate, error) {
	for _, c := range shown[min(1, len(shown)):] {
		if pinOf(c) == pin && c.IsCA {
			return c, nil
		}
	}
	ca := "none"
	if len(shown) > 1 {
		ca = fingerprint(shown[len(shown)-1])
	}
	return nil, fmt.Errorf("the coordinator at %s is not of the cluster that the token was made for (the token pins CA %x, and it shows %s); check the address and the token", host, pin[:8], ca)
}
