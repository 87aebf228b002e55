package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"strings"
)

// A token is one word: ovl1_<pin>_<id>_<secret>. The pin is the hash of the CA's
// public key, by which the bearer knows the coordinator before it shows the
// secret. The id says which token it is, and is no secret.
const (
	tokenPrefix = "ovl1"
	idBytes     = 5
	secretBytes = 20
)

// Token is what a joining host or person shows.
type Token struct {
	Pin    [sha256.Size]byte
	ID     string
	Secret []byte
}

var tokenEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// newToken makes one for a CA.
func newToken(pin [sha256.Size]byte) Token {
	b := make([]byte, idBytes+secretBytes)
	rand.Read(b) // never fails
	return Token{Pin: pin, ID: tokenEncoding.EncodeToString(b[:idBytes]), Secret: b[idBytes:]}
}

// String is the token with its secret.
func (t Token) String() string {
	return strings.Join([]string{tokenPrefix, tokenEncoding.EncodeToString(t.Pin[:]), t.ID, tokenEncoding.EncodeToString(t.Secret)}, "_")
}

var errToken = errors.New("this is no join token; overlayctl token create prints one, a word that begins with " + tokenPrefix + "_")

// ParseToken reads a token. The error does not repeat it.
func ParseToken(s string) (Token, error) {
	part := strings.Split(strings.TrimSpace(s), "_")
	if len(part) != 4 || part[0] != tokenPrefix {
		return Token{}, errToken
	}
	pin, err := tokenEncoding.DecodeString(part[1])
	if err != nil || len(pin) != sha256.Size {
		return Token{}, errToken
	}
	if id, err := tokenEncoding.DecodeString(part[2]); err != nil || len(id) != idBytes {
		return Token{}, errToken
	}
	secret, err := tokenEncoding.DecodeString(part[3])
	if err != nil || len(secret) != secretBytes {
		return Token{}, errToken
	}
	return Token{Pin: [sha256.Size]byte(pin), ID: part[2], Secret: secret}, nil
}

// hash is what the store has of the secret. It is long and random, so a plain
// hash will do.
func (t Token) hash() []byte {
	h := sha256.Sum256(append([]byte("overlay token "+t.ID+"\x00"), t.Secret...))
	return h[:]
}
