// Package pki says who speaks. The cluster has a certificate authority (CA) of
// its own, or one that its operator brings. Whoever shows a token gets a
// certificate of it that names a role and, for an agent, the agent id; from then
// on TLS 1.3 with that certificate is the identity.
//
// A Registry is the coordinators' side: CA, tokens and identities, which all
// coordinators share through a store.Store. A Member is the side of an agent or a
// person: a key, a certificate and the CA they were given, in files.
//
// What is secret in the store, the keys of the CA, is sealed with the cluster key,
// which lies in the state directory of every coordinator and nowhere else. Of a
// token the store has a hash.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
)

// Role is what an identity may do.
type Role string

const (
	RoleAgent       Role = "agent"       // register, report and watch, for itself alone
	RoleOperator    Role = "operator"    // everything
	RoleReader      Role = "reader"      // every GET
	RoleCoordinator Role = "coordinator" // serve as a coordinator
)

// Roles are all roles.
var Roles = [...]Role{RoleAgent, RoleOperator, RoleReader, RoleCoordinator}

// ParseRole checks a role.
func ParseRole(s string) (Role, error) {
	for _, r := range Roles {
		if s == string(r) {
			return r, nil
		}
	}
	return "", fmt.Errorf("role %.80q: want agent, operator, reader or coordinator", s)
}

// How long things are valid.
const (
	DefaultLife = 30 * 24 * time.Hour // of a certificate
	rootLife    = 10 * 365 * 24 * time.Hour
	backdate    = time.Hour // clocks differ
	// overlap is how long the CA before is trusted after a rotation: as long as
	// the last certificate of it lives.
	overlap = DefaultLife + 24*time.Hour
)

// Identity is who a certificate is of.
type Identity struct {
	Domain   string // of the cluster
	Role     Role
	Name     string // agent id, or name of a person
	Instance string // another one for every join; a renewal keeps it
}

func (i Identity) String() string { return string(i.Role) + " " + i.Name }

const scheme = "overlay"

// CheckName refuses what cannot be the name of an identity: anything but
// [A-Za-z0-9][A-Za-z0-9_.@-]{0,127}. A regular expression would be compiled at
// every start of every program.
func CheckName(name string) error {
	if !plainName(name) {
		return fmt.Errorf("name %.160q: want 1 to 128 letters, digits, '_', '.', '@' and '-', starting with a letter or digit", name)
	}
	return nil
}

func plainName(s string) bool {
	for i, c := range []byte(s) {
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '_' && c != '.' && c != '@' && c != '-') {
			return false
		}
	}
	return s != "" && len(s) <= 128
}

// uri is the identity as it stands in a certificate.
func (i Identity) uri() *url.URL {
	return &url.URL{Scheme: scheme, Host: i.Domain, Path: "/" + string(i.Role) + "/" + i.Name, RawQuery: url.Values{"instance": {i.Instance}}.Encode()}
}

// identityOf reads the identity out of a certificate, which proves nothing yet.
func identityOf(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 || cert.URIs[0].Scheme != scheme {
		return Identity{}, errors.New("the certificate names no identity of an overlay cluster")
	}
	u := cert.URIs[0]
	role, name, _ := strings.Cut(strings.TrimPrefix(u.Path, "/"), "/")
	i := Identity{Domain: u.Host, Name: name, Instance: u.Query().Get("instance")}
	var err error
	if i.Role, err = ParseRole(role); err == nil {
		err = CheckName(name)
	}
	if err != nil {
		return Identity{}, fmt.Errorf("the certificate names no identity of an overlay cluster: %w", err)
	}
	return i, nil
}

// Reasons for which an identity is refused.
const (
	ReasonRevoked  = "revoked"
	ReasonExpired  = "expired"
	ReasonClock    = "clock"    // not yet valid
	ReasonForeign  = "foreign"  // not of this cluster
	ReasonReplaced = "replaced" // somebody joined with the same name since
)

// Refused says why an identity is not accepted, and what to do.
type Refused struct{ Reason, Message string }

func (r *Refused) Error() string { return r.Message }

func newKey() (*ecdsa.PrivateKey, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// random is so many random bytes in hex.
func random(bytes int) string {
	b := make([]byte, bytes)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// Suffix is a few random letters, for names that are not to meet.
func Suffix() string { return random(2) }

// pinOf is the hash of a certificate's public key.
func pinOf(cert *x509.Certificate) [sha256.Size]byte {
	return sha256.Sum256(cert.RawSubjectPublicKeyInfo)
}

func encodeCerts(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// decodeCerts reads all certificates of a PEM text, of which there must be one.
func decodeCerts(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, errors.New("there is no certificate in PEM form")
	}
	return certs, nil
}

// fingerprint is how people compare CAs.
func fingerprint(cert *x509.Certificate) string {
	pin := pinOf(cert)
	return hex.EncodeToString(pin[:8])
}
