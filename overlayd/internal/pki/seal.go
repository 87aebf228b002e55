package pki

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
)

// What a sealing key is derived for.
const (
	sealRoot  = "overlay: key of the CA"
	sealToken = "overlay: cluster key in a coordinator's token"
	forDomain = "overlay: domain"
)

// derive makes a key of a secret for one purpose.
func derive(secret []byte, purpose string) []byte {
	k, err := hkdf.Key(sha256.New, secret, nil, purpose, 32)
	if err != nil {
		panic(err) // only if the length were wrong
	}
	return k
}

func aead(secret []byte, purpose string) (cipher.AEAD, error) {
	block, err := aes.NewCipher(derive(secret, purpose))
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// seal encrypts and authenticates.
func seal(secret []byte, purpose string, plain []byte) ([]byte, error) {
	a, err := aead(secret, purpose)
	if err != nil {
		return nil, err
	}
	return a.Seal(nil, nil, plain, nil), nil
}

var errSealed = errors.New("sealed with another key")

// unseal fails with errSealed for another key, and for what was changed.
func unseal(secret []byte, purpose string, sealed []byte) ([]byte, error) {
	a, err := aead(secret, purpose)
	if err != nil {
		return nil, err
	}
	plain, err := a.Open(nil, nil, sealed, nil)
	if err != nil {
		return nil, errSealed
	}
	return plain, nil
}

// newClusterKey is 32 random bytes.
func newClusterKey() []byte {
	k := make([]byte, 32)
	rand.Read(k) // never fails
	return k
}

// domainOf names the cluster in certificates. It lives as long as the cluster key,
// and so longer than any CA or store.
func domainOf(clusterKey []byte) string { return fmt.Sprintf("%x", derive(clusterKey, forDomain)[:8]) }
