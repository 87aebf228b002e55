package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
)

// handshakes are the credentials of a connection to a member. They remember why
// client and member do not accept each other: the client of etcd tries again until
// time has run out, and says only that it has.
type handshakes struct {
	credentials.TransportCredentials
	refusal *atomic.Pointer[error] // of the last connection; nil: it was accepted
}

func newHandshakes(c *tls.Config) handshakes {
	return handshakes{credentials.NewTLS(c), new(atomic.Pointer[error])}
}

// ClientHandshake is described with credentials.TransportCredentials.
func (h handshakes) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := h.TransportCredentials.ClientHandshake(ctx, authority, raw)
	if err != nil {
		if ctx.Err() == nil {
			h.refusal.Store(&err)
		}
		return nil, nil, err
	}
	return &shaken{Conn: conn, refusal: h.refusal}, info, nil
}

// Clone is described with credentials.TransportCredentials.
func (h handshakes) Clone() credentials.TransportCredentials {
	return handshakes{h.TransportCredentials.Clone(), h.refusal}
}

// shaken is a connection whose handshake the client has ended. In TLS 1.3 the
// member looks at the client's certificate afterwards, so a refusal is read.
type shaken struct {
	net.Conn
	refusal *atomic.Pointer[error]
}

func (s *shaken) Read(b []byte) (int, error) {
	n, err := s.Conn.Read(b)
	var alert *net.OpError
	switch {
	case errors.As(err, &alert) && alert.Op == "remote error":
		s.refusal.Store(&err)
	case err == nil:
		s.refusal.Store(nil)
	}
	return n, err
}

// explainHandshake says what a refusal means to who operates the coordinator.
func (o Options) explainHandshake(err error) error {
	var (
		unknown x509.UnknownAuthorityError
		invalid x509.CertificateInvalidError
		alert   *net.OpError
		plain   tls.RecordHeaderError
	)
	switch {
	case errors.As(err, &unknown) && o.CAFile == "":
		return fmt.Errorf("its certificate is signed by nobody whom this system trusts; give the CA of etcd with --store-ca: %w", err)
	case errors.As(err, &unknown):
		return fmt.Errorf("its certificate is not signed by the CA in %s; give the CA of this etcd with --store-ca: %w", o.CAFile, err)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Errorf("its certificate has expired, or the clock of this host is wrong; give etcd a new one (--cert-file): %w", err)
	case errors.As(err, &alert) && alert.Op == "remote error" && o.CertFile == "":
		return fmt.Errorf("it demands a certificate of its clients; give one with --store-cert and --store-key: %w", err)
	case errors.As(err, &alert) && alert.Op == "remote error":
		return fmt.Errorf("it refuses the client certificate in %s%s: %w", o.CertFile, o.fault(), err)
	case errors.As(err, &plain):
		return fmt.Errorf("it does not speak TLS; write http:// in --store, without certificates, or give etcd a certificate: %w", err)
	}
	return fmt.Errorf("no TLS with it: %w", err)
}

// fault is what is wrong with the client's certificate, as far as can be seen here.
func (o Options) fault() string {
	const signer = ", which must be signed by the CA that etcd trusts (--trusted-ca-file) and be for client authentication"
	b, err := os.ReadFile(o.CertFile)
	if err != nil {
		return ", which cannot be read (" + err.Error() + ")"
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return ", which holds no certificate in PEM form"
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return ", which holds no certificate (" + err.Error() + ")"
	}
	switch now := time.Now(); {
	case now.After(cert.NotAfter):
		return ", which has expired on " + cert.NotAfter.UTC().Format(time.DateTime) + " UTC; put a new one there"
	case now.Before(cert.NotBefore):
		return ", which is not valid before " + cert.NotBefore.UTC().Format(time.DateTime) + " UTC; is the clock right?"
	}
	return signer
}
