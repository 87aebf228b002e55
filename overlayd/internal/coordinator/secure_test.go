package coordinator_test

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/pki"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// clock is one that can be set.
type clock struct {
	mu  sync.Mutex
	off time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.off)
}

// at runs f as if it were so much later.
func (c *clock) at(later time.Duration, f func()) {
	set := func(d time.Duration) {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.off = d
	}
	set(later)
	defer set(0)
	f()
}

// secureNode is a coordinator with identities that serves over TLS, and on a
// socket for its operator.
type secureNode struct {
	*coordinator.Coordinator
	registry *pki.Registry
	clock    *clock
	url      string // https
	path     string // of the store's file
	dir      string // of its keys
	root     *api.Client
	stop     func()
}

// startSecure starts one. Options may change what it is made of.
func startSecure(t testing.TB, s store.Store, path string, options ...func(*pki.Options, *coordinator.Options)) *secureNode {
	t.Helper()
	n := &secureNode{clock: &clock{}, path: path, dir: t.TempDir()}
	po := pki.Options{Store: s, Dir: filepath.Join(n.dir, pki.Dir), Log: slog.New(slog.DiscardHandler), Now: n.clock.now}
	co := coordinator.Options{Network: parseNetwork(t, seedNetwork), Store: s, Log: slog.New(slog.DiscardHandler), Version: "test"}
	for _, o := range options {
		o(&po, &co)
	}
	var err error
	age := -60 * 24 * time.Hour // the cluster is not of today
	if _, err := os.Stat(po.Dir); err == nil {
		age = 0 // what happens now does
	}
	n.clock.at(age, func() { n.registry, err = pki.Open(t.Context(), po) })
	if err != nil {
		t.Fatal(err)
	}
	co.Identity = n.registry
	l, err := serve.ListenTCP(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n.url = "https://" + l.Addr().String()
	if co.Shared {
		co.URLs, co.PeerClient = []string{n.url}, n.registry.Client()
	}
	if n.Coordinator, err = coordinator.New(t.Context(), co); err != nil {
		t.Fatal(err)
	}
	local, err := serve.Socket{Path: filepath.Join(n.dir, coordinator.SocketFile), Perm: 0o600, Look: time.Second}.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var ran sync.WaitGroup
	for _, f := range []func() error{
		func() error { return n.Run(ctx) }, func() error { return n.registry.Run(ctx) },
		func() error { return n.Serve(ctx, l) }, func() error { return n.ServeLocal(ctx, local) },
	} {
		ran.Go(func() {
			if err := f(); err != nil {
				t.Error(err)
			}
		})
	}
	transport := &http.Transport{DialContext: dialSocket(filepath.Join(n.dir, coordinator.SocketFile))}
	n.root = newClient(t, "http://localhost", &http.Client{Transport: transport})
	n.stop = sync.OnceFunc(func() {
		transport.CloseIdleConnections()
		cancel()
		ran.Wait()
	})
	t.Cleanup(n.stop)
	eventually(t, "ready", func() bool { return n.root.Ready(t.Context()) == nil })
	return n
}

// secure is startSecure on a store of its own.
func secure(t testing.TB, options ...func(*pki.Options, *coordinator.Options)) *secureNode {
	t.Helper()
	path := filepath.Join(t.TempDir(), "coordinator.db")
	return startSecure(t, openStore(t, path), path, options...)
}

func newClient(t testing.TB, url string, hc *http.Client) *api.Client {
	t.Helper()
	c, err := api.NewClient([]string{url}, hc)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (n *secureNode) token(t testing.TB, req api.TokenRequest) string {
	t.Helper()
	if req.Role == "" {
		req.Role = "agent"
	}
	if req.Uses == 0 {
		req.Uses = 1
	}
	if req.TTLSeconds == 0 {
		req.TTLSeconds = 3600
	}
	created, err := n.root.TokenCreate(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return created.Token
}

// person is somebody with a key in a directory.
type person struct {
	*api.Client
	*pki.Member
	dir string
	url string
}

// join makes somebody who joins with a token at the first request.
func (n *secureNode) join(t testing.TB, name, token string) *person {
	t.Helper()
	return n.open(t, t.TempDir(), name, token)
}

// open is join with a directory, which may have a key already.
func (n *secureNode) open(t testing.TB, dir, name, token string) *person {
	t.Helper()
	m, err := pki.OpenMember(pki.MemberOptions{Dir: dir, Name: name, Token: func() (string, error) { return token, nil }, Now: n.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.CloseIdleConnections)
	return &person{Client: newClient(t, n.url, m.Client()), Member: m, dir: dir, url: n.url}
}

// agent is somebody with role agent, who has joined.
func (n *secureNode) agent(t testing.TB, id string) *person {
	t.Helper()
	p := n.join(t, id, n.token(t, api.TokenRequest{}))
	if _, err := p.Whoami(t.Context()); err != nil {
		t.Fatal(err)
	}
	return p
}

// certificate is what the person shows.
func (p *person) certificate(t testing.TB) tls.Certificate {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(p.dir, "identity.pem"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(text, text)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// as makes requests with a certificate, whatever the server shows.
func as(t testing.TB, certs ...tls.Certificate) *http.Client {
	tr := &http.Transport{TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true, MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if len(certs) > 0 {
				return &certs[0], nil
			}
			return &tls.Certificate{}, nil
		},
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func encodeJSON(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprint(err)) // plain data
	}
	return string(b)
}

func (n *secureNode) log() *slog.Logger { return slog.New(slog.DiscardHandler) }

// writeCA makes an operator's CA.
func writeCA(t testing.TB, dir string) {
	t.Helper()
	key := newECKey(t)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "the operator's"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{"ca.crt": {Type: "CERTIFICATE", Bytes: der}, "ca.key": {Type: "EC PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
