package pki

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"slices"
)

// A lease is signed for the cluster itself: a coordinator signs, and after the
// store was lost another one, or the same, checks. So the signatures are codes that
// need a secret of the cluster. Each lease carries two, of which one will do: by
// the cluster key, which every coordinator keeps in its state directory, and by the
// key of the CA that issued at the time, which an operator who brings the CA has
// elsewhere.

// What the keys for leases are derived for.
const (
	forLeases   = "overlay: signature of leases"
	forLeasesCA = "overlay: signature of leases, by the CA"
)

// leaseKeys are the keys that leases are checked with, those of the CAs last and of
// the one that issues the very last.
func leaseKeys(clusterKey []byte, roots []*root) ([][]byte, error) {
	keys := [][]byte{derive(clusterKey, forLeases)}
	for _, r := range roots {
		der, err := x509.MarshalPKCS8PrivateKey(r.key)
		if err != nil {
			return nil, fmt.Errorf("encode the CA's key: %w", err)
		}
		keys = append(keys, derive(der, forLeasesCA))
	}
	return keys, nil
}

func leaseCode(key []byte, lease string) []byte {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(lease))
	return m.Sum(nil)
}

// SignLease signs a lease with the keys of now.
func (r *Registry) SignLease(lease string) [][]byte {
	keys := r.auth.Load().leaseKeys
	return [][]byte{leaseCode(keys[0], lease), leaseCode(keys[len(keys)-1], lease)}
}

// SignedLease reports whether one of the signatures is by a key of this cluster.
func (r *Registry) SignedLease(lease string, signatures [][]byte) bool {
	for _, key := range r.auth.Load().leaseKeys {
		want := leaseCode(key, lease)
		if slices.ContainsFunc(signatures, func(s []byte) bool { return hmac.Equal(s, want) }) {
			return true
		}
	}
	return false
}
