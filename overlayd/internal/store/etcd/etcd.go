// Package etcd keeps the coordinator's data in an etcd cluster, for any number of
// coordinators at once.
//
// A store's revision is etcd's. All keys begin with a prefix, so that other
// programs may use the same etcd. The store talks to one member at a time: an
// etcd client that is given all of them goes round, and each call that meets a
// member that hangs waits for its whole time. A probe asks the member every
// second; when it does not answer, or has lost its leader, the store moves to the
// member that answers first. See docs/adr/0023-etcd.md.
package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Errors a caller branches on.
var (
	// ErrClosed: Close was called.
	ErrClosed = errors.New("the store is closed")
	// ErrReplaced: etcd has gone back in its revisions, or is another cluster.
	// What was read before is worth nothing; open the store anew.
	ErrReplaced = errors.New("etcd is not the one it was")
)

// Options say where the store is.
type Options struct {
	Endpoints []string // as Parse returns them
	Prefix    string   // of every key, without a slash at the end
	CAFile    string   // who signed the members' certificates; empty: the system's
	CertFile  string   // of this client; empty: none
	KeyFile   string
	Log       *slog.Logger
}

// Store implements store.Store.
type Store struct {
	options Options
	prefix  string // of every key
	tls     *tls.Config
	log     *slog.Logger

	closing chan struct{}
	probing sync.WaitGroup
	close   func() error

	high    atomic.Uint64 // highest revision seen
	cluster atomic.Uint64 // id of the etcd cluster

	mu      sync.Mutex // guards what follows
	member  *member
	moved   chan struct{} // closed when member changes
	noSpace bool          // the last answer about it was that the quota is used up
	problem error         // why nothing can be read or written; nil: it can
	failed  error         // for good
}

// Open connects to the cluster and waits until a member answers or ctx ends. The
// error then says what each of them answered.
func Open(ctx context.Context, o Options) (*Store, error) {
	if len(o.Endpoints) == 0 {
		return nil, errors.New("open etcd: no endpoints")
	}
	s := &Store{
		options: o, prefix: o.Prefix + "/", log: o.Log,
		closing: make(chan struct{}),
		moved:   make(chan struct{}),
	}
	var err error
	if s.tls, err = o.tlsConfig(); err != nil {
		return nil, fmt.Errorf("open etcd: %w", err)
	}
	// Each coordinator begins with another member.
	rand.Shuffle(len(s.options.Endpoints), func(i, j int) {
		e := s.options.Endpoints
		e[i], e[j] = e[j], e[i]
	})
	var why error
	for {
		err := s.findMember(ctx)
		if err == nil {
			break
		}
		if why == nil || ctx.Err() == nil { // one that was cut short knows less
			why = err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("open etcd: %w", why)
		case <-time.After(retryPause):
		}
	}
	probe, stop := context.WithCancel(context.Background())
	s.probing.Go(func() { s.keepProbing(probe) })
	s.close = sync.OnceValue(func() error {
		close(s.closing)
		stop()
		s.probing.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.member.close()
	})
	return s, nil
}

// Close is described with store.Store. It may be called more than once.
func (s *Store) Close() error { return s.close() }

func (s *Store) closedError() error {
	select {
	case <-s.closing:
		return ErrClosed
	default:
		return nil
	}
}

// tlsConfig is nil when every endpoint is plain HTTP.
func (o Options) tlsConfig() (*tls.Config, error) {
	plain, secure := 0, 0
	for _, e := range o.Endpoints {
		if strings.HasPrefix(e, "https://") {
			secure++
		} else {
			plain++
		}
	}
	files := o.CAFile != "" || o.CertFile != "" || o.KeyFile != ""
	switch {
	case plain > 0 && secure > 0:
		return nil, errors.New("some endpoints are http and some https; use one of them for all")
	case plain > 0 && files:
		return nil, errors.New("certificates are given, but the endpoints are http; write https://")
	case plain > 0:
		return nil, nil
	case (o.CertFile == "") != (o.KeyFile == ""):
		return nil, errors.New("a certificate and its key go together; one of them is missing")
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if o.CAFile != "" {
		pem, err := os.ReadFile(o.CAFile)
		if err != nil {
			return nil, err
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate in PEM form", o.CAFile)
		}
	}
	if o.CertFile != "" {
		// Read at each connection, so that a renewed certificate is taken over.
		if _, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile); err != nil {
			return nil, err
		}
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
			return &pair, err
		}
	}
	return c, nil
}
