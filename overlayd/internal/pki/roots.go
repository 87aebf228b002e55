package pki

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/logkey"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// Files of a coordinator in the directory pki of its state directory. The second
// is a copy of what the store has, so that the CA outlives the store.
const (
	clusterKeyFile = "cluster.key"
	rootsFile      = "roots.json"
)

// Files an operator brings with --pki-dir.
const (
	OperatorCert = "ca.crt"
	OperatorKey  = "ca.key"
)

// storedRoot is a root as the store has it. The key is sealed.
type storedRoot struct {
	Cert  []byte    `json:"cert"`
	Cross []byte    `json:"cross,omitempty"`
	Key   []byte    `json:"key"`
	Until time.Time `json:"until,omitzero"`
}

func encodeRoots(clusterKey []byte, roots []*root) ([]byte, error) {
	var out []storedRoot
	for _, r := range roots {
		der, err := x509.MarshalPKCS8PrivateKey(r.key)
		if err != nil {
			return nil, fmt.Errorf("encode the CA's key: %w", err)
		}
		s := storedRoot{Cert: r.cert.Raw, Until: r.until}
		if s.Key, err = seal(clusterKey, sealRoot, der); err != nil {
			return nil, fmt.Errorf("seal the CA's key: %w", err)
		}
		if r.cross != nil {
			s.Cross = r.cross.Raw
		}
		out = append(out, s)
	}
	return json.Marshal(out)
}

func decodeRoots(clusterKey, text []byte) ([]*root, error) {
	var stored []storedRoot
	if err := json.Unmarshal(text, &stored); err != nil {
		return nil, fmt.Errorf("read the CA: %w", err)
	}
	var roots []*root
	for _, s := range stored {
		r := &root{until: s.Until}
		var err error
		if r.cert, err = x509.ParseCertificate(s.Cert); err != nil {
			return nil, fmt.Errorf("read the CA: %w", err)
		}
		if len(s.Cross) > 0 {
			if r.cross, err = x509.ParseCertificate(s.Cross); err != nil {
				return nil, fmt.Errorf("read the CA: %w", err)
			}
		}
		der, err := unseal(clusterKey, sealRoot, s.Key)
		if err != nil {
			return nil, err
		}
		if r.key, err = parseKey(der); err != nil {
			return nil, fmt.Errorf("read the CA's key: %w", err)
		}
		roots = append(roots, r)
	}
	if len(roots) == 0 {
		return nil, errors.New("read the CA: there is none")
	}
	return roots, nil
}

func parseKey(der []byte) (crypto.Signer, error) {
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		if ec, ecErr := x509.ParseECPrivateKey(der); ecErr == nil {
			return ec, nil
		}
		if rsa, rsaErr := x509.ParsePKCS1PrivateKey(der); rsaErr == nil {
			return rsa, nil
		}
		return nil, err
	}
	s, ok := k.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a key of type %T cannot sign", k)
	}
	return s, nil
}

// loadOperatorRoot reads the CA that the operator brings.
func loadOperatorRoot(dir string) (*root, error) {
	text, err := os.ReadFile(filepath.Join(dir, OperatorCert))
	if err != nil {
		return nil, err
	}
	certs, err := decodeCerts(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, OperatorCert), err)
	}
	keyPath := filepath.Join(dir, OperatorKey)
	if text, err = os.ReadFile(keyPath); err != nil {
		return nil, err
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("%s: there is no key in PEM form", keyPath)
	}
	key, err := parseKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", keyPath, err)
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	switch c := certs[0]; {
	case !ok || !public.Equal(c.PublicKey):
		return nil, fmt.Errorf("%s is not the key of %s", keyPath, OperatorCert)
	case !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, fmt.Errorf("%s: the certificate is not that of a CA (basicConstraints CA:TRUE, keyUsage keyCertSign)", filepath.Join(dir, OperatorCert))
	case time.Now().After(c.NotAfter):
		return nil, fmt.Errorf("%s: the CA expired at %s", filepath.Join(dir, OperatorCert), c.NotAfter.UTC().Format(time.RFC3339))
	}
	return &root{cert: certs[0], key: key}, nil
}

// openDir makes a directory for keys, for its owner alone.
func openDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.Chmod(dir, 0o700)
}

// readClusterKey returns nil when there is none.
func readClusterKey(dir string) ([]byte, error) {
	path := filepath.Join(dir, clusterKeyFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	key := make([]byte, hex.DecodedLen(max(len(text)-1, 0)))
	if _, err := hex.Decode(key, text[:max(len(text)-1, 0)]); err != nil || len(key) != 32 {
		return nil, fmt.Errorf("%s is damaged; put it back from a backup or from another coordinator of the cluster", path)
	}
	return key, nil
}

func writeClusterKey(dir string, key []byte) error {
	return conf.WriteFile(filepath.Join(dir, clusterKeyFile), []byte(hex.EncodeToString(key)+"\n"), 0o600, "")
}

// begin returns the CA of the store, made if there is none.
func (r *Registry) begin(ctx context.Context) error {
	dir := r.o.Dir
	if err := openDir(dir); err != nil {
		return err
	}
	key, err := readClusterKey(dir)
	if err != nil {
		return err
	}
	for {
		stored, err := r.read(ctx, keyRoots)
		if err != nil {
			return fmt.Errorf("read the store: %w", err)
		}
		switch {
		case stored.Mod == 0:
			if r.o.JoinToken != "" {
				return errors.New("--join-token: the store holds no cluster that could be joined; the first coordinator starts without a token (is --store the same?)")
			}
			key, err = r.create(ctx, key)
		case key == nil:
			key, err = r.joinCluster(ctx)
		default:
			return r.take(ctx, key, stored)
		}
		if err != nil && !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrUnknown) {
			return err
		}
	}
}

// create makes the CA, or puts back the one that the files have, of a store that
// is no longer.
func (r *Registry) create(ctx context.Context, key []byte) ([]byte, error) {
	var text []byte
	fresh := key == nil
	if !fresh {
		var err error
		if text, err = os.ReadFile(filepath.Join(r.o.Dir, rootsFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if text != nil {
			if _, err := decodeRoots(key, text); err != nil {
				return nil, fmt.Errorf("%s: %w", filepath.Join(r.o.Dir, rootsFile), err)
			}
			r.o.Log.Warn("the store has no CA; the one in the state directory is put back", logkey.Path, filepath.Join(r.o.Dir, rootsFile))
		}
	} else {
		key = newClusterKey()
	}
	if text == nil {
		first, err := newRoot(domainOf(key), r.o.Now())
		if r.o.OperatorDir != "" {
			first, err = loadOperatorRoot(r.o.OperatorDir)
		}
		if err != nil {
			return nil, err
		}
		if text, err = encodeRoots(key, []*root{first}); err != nil {
			return nil, err
		}
	}
	if err := writeClusterKey(r.o.Dir, key); err != nil {
		return nil, err
	}
	_, err := r.o.Store.Commit(ctx, store.Txn{If: []store.Cond{{Key: keyRoots}}, Then: []store.Op{{Key: keyRoots, Value: text}}})
	if errors.Is(err, store.ErrConflict) && fresh { // another coordinator was first
		return nil, errors.Join(os.Remove(filepath.Join(r.o.Dir, clusterKeyFile)), err)
	}
	return key, err
}

// take makes the stored CA ours.
func (r *Registry) take(ctx context.Context, key []byte, stored store.KV) error {
	if _, err := r.setRoots(key, stored); errors.Is(err, errSealed) {
		return fmt.Errorf("%s is not the key of the cluster in the store: another coordinator made the CA; remove the file, and start with --join-token and a token of role coordinator",
			filepath.Join(r.o.Dir, clusterKeyFile))
	} else if err != nil {
		return err
	}
	r.key = key
	if r.o.OperatorDir == "" {
		return nil
	}
	brought, err := loadOperatorRoot(r.o.OperatorDir)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(r.auth.Load().roots, func(have *root) bool { return have.cert.Equal(brought.cert) }) {
		return nil
	}
	r.o.Log.Info("the CA in the operator's directory is another one; it issues from now on", logkey.Dir, r.o.OperatorDir, logkey.CA, fingerprint(brought.cert))
	return r.rotateTo(ctx, brought)
}

// setRoots takes over what the store says, unless something newer is in force, and
// keeps a copy in a file. taken says that it is in force now; one whose copy cannot be
// written is, too.
func (r *Registry) setRoots(key []byte, stored store.KV) (taken bool, err error) {
	roots, err := decodeRoots(key, stored.Value)
	if err != nil {
		return false, err
	}
	next := newAuthority(domainOf(key), roots)
	if next.leaseKeys, err = leaseKeys(key, roots); err != nil {
		return false, err
	}
	r.rootsMu.Lock() // who changes them and who follows the store both come here
	defer r.rootsMu.Unlock()
	if stored.Mod <= r.rootsMod && r.auth.Load() != nil {
		return false, nil
	}
	r.auth.Store(next)
	r.rootsMod, r.unsaved = stored.Mod, stored.Value
	return true, r.saveRootsLocked()
}

// saveRoots writes the copy that could not be written before.
func (r *Registry) saveRoots() error {
	r.rootsMu.Lock()
	defer r.rootsMu.Unlock()
	return r.saveRootsLocked()
}

func (r *Registry) saveRootsLocked() error {
	if r.unsaved == nil {
		return nil
	}
	path := filepath.Join(r.o.Dir, rootsFile)
	if err := conf.WriteFile(path, r.unsaved, 0o600, ""); err != nil {
		return fmt.Errorf("keep a copy of the CA, which a lost store would need: %w", err)
	}
	r.unsaved = nil
	return nil
}

// joinCluster gets the cluster key out of a token of role coordinator. Only the
// store has to be there for that, no other coordinator.
func (r *Registry) joinCluster(ctx context.Context) ([]byte, error) {
	if r.o.JoinToken == "" {
		return nil, fmt.Errorf("the store holds a cluster whose key is not in %s; start with --join-token and a token of role coordinator "+
			"(on the host of another coordinator: overlayctl token create --role coordinator), or put %s back from a backup", r.o.Dir, clusterKeyFile)
	}
	t, err := ParseToken(r.o.JoinToken)
	if err != nil {
		return nil, fmt.Errorf("--join-token: %w", err)
	}
	kv, err := r.read(ctx, keyToken(t.ID))
	if err != nil {
		return nil, fmt.Errorf("read the store: %w", err)
	}
	record, err := checkToken(t, kv, r.o.Now())
	if err == nil && record.Role != RoleCoordinator {
		err = fmt.Errorf("the token is one of role %s, want coordinator", record.Role)
	}
	if err != nil {
		return nil, fmt.Errorf("--join-token: %w", err)
	}
	key, err := unseal(derive(t.Secret, sealToken), sealToken, record.ClusterKey)
	if err != nil {
		return nil, fmt.Errorf("--join-token: the cluster key: %w", err)
	}
	record.Left--
	record.Taker = rand.Text()
	value, err := json.Marshal(record)
	if err != nil {
		return nil, err
	}
	// The key goes to a file when the token is used for sure, and no sooner: of two that
	// want the last use of a token, one gets nothing.
	_, err = r.o.Store.Commit(ctx, store.Txn{If: []store.Cond{{Key: kv.Key, Mod: kv.Mod}}, Then: []store.Op{{Key: kv.Key, Value: value}}})
	if errors.Is(err, store.ErrUnknown) {
		now, readErr := r.read(ctx, kv.Key)
		if readErr != nil {
			return nil, fmt.Errorf("read the store: %w", readErr)
		}
		if bytes.Equal(now.Value, value) {
			err = nil
		}
	}
	if err != nil {
		return nil, err
	}
	if err := writeClusterKey(r.o.Dir, key); err != nil {
		return nil, fmt.Errorf("the token is used, and the key cannot be kept; make another token: %w", err)
	}
	r.o.Log.Info("joined the cluster as a coordinator", logkey.Token, t.ID)
	return key, nil
}
