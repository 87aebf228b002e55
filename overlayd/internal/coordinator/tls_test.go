package coordinator_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/pki"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// follow watches for a member, and comes back whenever the stream ends, as an
// agent does. It reports when it is connected, and why it was not.
func follow(t *testing.T, p *person, id string) (connected chan struct{}, ended chan error) {
	ctx, cancel := context.WithCancel(context.Background())
	connected, ended = make(chan struct{}, 64), make(chan error, 64)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			first := true
			err := p.Watch(ctx, id, api.Known{}, func(api.PeerEvent) error {
				if first {
					connected <- struct{}{}
				}
				first = false
				return nil
			})
			select {
			case ended <- err:
			default:
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return connected, ended
}

func await[T any](t *testing.T, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("still not: %s", what)
		panic("not reached")
	}
}

// Revoking ends what is open at once, and what comes then is refused with the
// reason.
func TestRevokeClosesStreams(t *testing.T) {
	n := secure(t)
	for _, id := range []string{"good", "bad"} {
		p := n.agent(t, id)
		if _, err := p.Register(t.Context(), request(id, map[string]string{"good": "10.0.0.1", "bad": "10.0.0.2"}[id])); err != nil {
			t.Fatal(err)
		}
		connected, ended := follow(t, p, id)
		await(t, id+" to be connected", connected)
		if id == "good" {
			defer func() {
				select {
				case err := <-ended:
					t.Errorf("the stream of another agent ended: %v", err)
				default:
				}
			}()
			continue
		}
		start := time.Now()
		if err := n.root.AgentsRevoke(t.Context(), []string{"bad"}); err != nil {
			t.Fatal(err)
		}
		err := await(t, "the stream to end", ended)
		if took := time.Since(start); took > time.Second {
			t.Errorf("the stream ended after %v (%v)", took, err)
		}
		err = await(t, "the next stream to be refused", ended)
		refused(t, err, http.StatusForbidden, "was revoked at")
	}
}

// Certificates are renewed in time, over the old one, while requests go on, and a
// stream that outlives its certificate ends.
func TestCertificateRenewal(t *testing.T) {
	const life = 6 * time.Second
	n := secure(t, func(o *pki.Options, _ *coordinator.Options) { o.Life = life })
	a := n.agent(t, "a")
	if _, err := a.Register(t.Context(), request("a", "10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	connected, ended := follow(t, a, "a")
	await(t, "a stream", connected)
	first := a.certificate(t).Leaf.SerialNumber
	for start := time.Now(); time.Since(start) < 2*life; time.Sleep(50 * time.Millisecond) {
		if _, err := a.Register(t.Context(), request("a", "10.0.0.1")); err != nil {
			t.Fatalf("after %v: %v", time.Since(start), err)
		}
	}
	if now := a.certificate(t).Leaf.SerialNumber; now.Cmp(first) == 0 {
		t.Error("the certificate is the one of the beginning")
	}
	select {
	case <-ended:
		await(t, "the stream to be back", connected)
	default:
		t.Error("the stream outlived its certificate")
	}
}

// A new CA is learned of by everybody while everything goes on; the old one can
// go then. Who missed it all has to join again.
func TestRotation(t *testing.T) {
	n := secure(t)
	a, away := n.agent(t, "a"), n.agent(t, "away")
	if _, err := a.Register(t.Context(), request("a", "10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	connected, ended := follow(t, a, "a")
	await(t, "a stream", connected)
	token := n.token(t, api.TokenRequest{}) // pins the first CA

	for round := range 2 {
		cas, err := n.root.CARotate(t.Context(), api.RotateRequest{})
		if err != nil || len(cas) != 2+round || cas[len(cas)-1].Issues != true {
			t.Fatalf("CAs %+v, %v", cas, err)
		}
	}
	select {
	case err := <-ended:
		t.Errorf("a rotation ended a stream: %v", err)
	default:
	}
	// New connections, of somebody who knows the first CA only, and a token of it.
	if _, err := n.open(t, away.dir, "away", "").Whoami(t.Context()); err != nil {
		t.Errorf("who knows the first CA only: %v", err)
	}
	if _, err := n.join(t, "b", token).Whoami(t.Context()); err != nil {
		t.Errorf("a token that pins the first CA: %v", err)
	}
	// Within half a minute a knows of the new ones.
	n.clock.at(time.Minute, func() {
		eventually(t, "a to know all CAs", func() bool {
			if _, err := a.Register(t.Context(), request("a", "10.0.0.1")); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(filepath.Join(a.dir, "ca.pem"))
			return err == nil && strings.Count(string(b), "BEGIN") == 3
		})
	})
	start := time.Now()
	if cas, err := n.root.CARotate(t.Context(), api.RotateRequest{Retire: true}); err != nil || len(cas) != 1 {
		t.Fatalf("CAs %+v, %v", cas, err)
	}
	await(t, "the stream of before to end", ended)
	await(t, "the stream to be back", connected)
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("the stream was away for %v", took)
	}
	_, err := n.open(t, away.dir, "away", "").Whoami(t.Context())
	if err == nil || !strings.Contains(err.Error(), "is of another CA than the one this host joined") {
		t.Errorf("who missed it: %v", err)
	}
	back := n.open(t, away.dir, "away", n.token(t, api.TokenRequest{AgentID: "away"}))
	eventually(t, "who missed it to be back", func() bool { _, err := back.Whoami(t.Context()); return err == nil })
}

// TestServerThatIsNone: a member says what it met instead of its coordinator.
func TestServerThatIsNone(t *testing.T) {
	n := secure(t, func(o *pki.Options, _ *coordinator.Options) { o.Names = []string{"overlay.example.com", "192.0.2.1"} })
	a, b := n.agent(t, "a"), n.agent(t, "b")
	other := secure(t)
	meet := func(p *person, url string) error {
		return newClient(t, url, p.Client2()).Ready(t.Context())
	}
	says := func(what string, err error, words string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), words) || errors.As(err, new(*api.Error)) {
			t.Errorf("%s: %v\nwant %q", what, err, words)
		}
	}
	says("another cluster", meet(a, other.url), "is of another CA than the one this host joined")
	says("a token of another cluster", n.join(t, "x", other.token(t, api.TokenRequest{})).Ready(t.Context()), "is not of the cluster that the token was made for")

	plain := httptest.NewServer(n.Handler())
	defer plain.Close()
	says("plain HTTP", meet(a, plain.URL), "has to begin with https://")
	says("plain HTTP behind https", meet(a, strings.Replace(plain.URL, "http:", "https:", 1)), "speaks plain HTTP without any identity (--insecure)")

	// An agent of the cluster stands in for the coordinator.
	rogue := httptest.NewUnstartedServer(http.NotFoundHandler())
	rogue.TLS = &tls.Config{Certificates: []tls.Certificate{b.certificate(t)}}
	rogue.Config.ErrorLog = log.New(io.Discard, "", 0)
	rogue.StartTLS()
	defer rogue.Close()
	says("another agent", meet(a, rogue.URL), "127.0.0.1")
	if err := meet(a, rogue.URL); err == nil {
		t.Error("an agent passes for a coordinator")
	}

	// The certificate is for other names, and for every address of the host.
	host := strings.Replace(n.url, "127.0.0.1", "localhost.localdomain", 1)
	if err := meet(a, host); err == nil || !strings.Contains(err.Error(), "--advertise localhost.localdomain") && !strings.Contains(err.Error(), "no such host") {
		t.Errorf("a name it was not told of: %v", err)
	}
	if err := meet(a, strings.Replace(n.url, "127.0.0.1", "127.0.0.2", 1)); err == nil {
		t.Error("127.0.0.2 answers, though the port is open on 127.0.0.1 alone")
	}

	// Clocks.
	n.clock.at(-90*time.Minute, func() {
		_, err := n.open(t, a.dir, "a", "").Whoami(t.Context())
		refused(t, err, http.StatusForbidden, "the clock of this coordinator says", "set the clocks right")
	})
	late := &clock{}
	late.at(-4*time.Hour, func() {
		m, err := pki.OpenMember(pki.MemberOptions{Dir: a.dir, Name: "a", Now: late.now})
		if err != nil {
			t.Fatal(err)
		}
		defer m.CloseIdleConnections()
		says("a clock that is late", newClient(t, n.url, m.Client()).Ready(t.Context()), "set the clocks right")
	})
	late.at(20*24*time.Hour, func() {
		m, err := pki.OpenMember(pki.MemberOptions{Dir: a.dir, Name: "a", Now: late.now})
		if err != nil {
			t.Fatal(err)
		}
		defer m.CloseIdleConnections()
		says("a clock that is early", newClient(t, n.url, m.Client()).Ready(t.Context()), "the clocks of this host and of the coordinator")
	})
	if err := a.SetName("z"); err == nil || !strings.Contains(err.Error(), "has the certificate of agent a") {
		t.Errorf("another agent id: %v", err)
	}
	if _, err := pki.OpenMember(pki.MemberOptions{Dir: damagedCopy(t, a.dir)}); err == nil || !strings.Contains(err.Error(), "put the file back, or remove the directory") {
		t.Errorf("a damaged key: %v", err)
	}
}

// Client2 is the HTTP client of the person, for other addresses.
func (p *person) Client2() *http.Client { return p.Member.Client() }

func damagedCopy(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	for _, name := range []string{"identity.pem", "ca.pem"} {
		b := content(t, filepath.Join(dir, name))
		if err := os.WriteFile(filepath.Join(to, name), b[:len(b)/2], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return to
}

// Every address of the host is in the certificate once somebody connects to it.
func TestAddressesOfTheHost(t *testing.T) {
	n := secure(t)
	l, err := serve.ListenTCP(t.Context(), "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Serve(ctx, l) }()
	defer func() { cancel(); <-done }()
	a := n.agent(t, "a")
	port := l.Addr().String()[strings.LastIndexByte(l.Addr().String(), ':'):]
	for _, host := range []string{"127.0.0.1", "127.0.0.2", "127.9.9.9", "localhost"} {
		if err := newClient(t, "https://"+host+port, a.Client2()).Ready(t.Context()); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
}

// What is served to nobody, and what not.
func TestAnonymous(t *testing.T) {
	for _, public := range []bool{false, true} {
		n := secure(t, func(_ *pki.Options, o *coordinator.Options) { o.StatePublic = public })
		client := newClient(t, n.url, as(t))
		if err := client.Ready(t.Context()); err != nil {
			t.Error(err)
		}
		_, err := client.State(t.Context())
		if public != (err == nil) {
			t.Errorf("the state, public %v: %v", public, err)
		}
		_, err = client.Agents(t.Context())
		refused(t, err, http.StatusUnauthorized)
		for path, want := range map[string]string{api.PathHealth: `{"status":"ok"}`, api.PathReady: `{"status":"ready"}`} {
			resp, err := as(t).Get(n.url + path)
			if err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 100)
			k, _ := resp.Body.Read(b)
			resp.Body.Close()
			if strings.TrimSpace(string(b[:k])) != want {
				t.Errorf("%s: %s", path, b[:k])
			}
		}
	}
}

// An operator brings his CA; another one in its place is a rotation.
func TestOperatorsCA(t *testing.T) {
	dir := t.TempDir()
	writeCA(t, dir)
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	keys := ""
	brings := func(o *pki.Options, _ *coordinator.Options) {
		o.OperatorDir = dir
		if keys != "" {
			o.Dir = keys
		}
		keys = o.Dir
	}
	n := startSecure(t, s, path, brings)
	a := n.agent(t, "a")
	if issuer := a.certificate(t).Leaf.Issuer.CommonName; issuer != "the operator's" {
		t.Errorf("issued by %s", issuer)
	}
	_, err := n.root.CARotate(t.Context(), api.RotateRequest{})
	refused(t, err, http.StatusConflict, "put another one there and restart the coordinator")
	n.stop()
	writeCA(t, dir)
	n = startSecure(t, s, path, brings)
	if _, err := n.open(t, a.dir, "a", "").Whoami(t.Context()); err != nil {
		t.Errorf("after another CA was put there: %v", err)
	}
	if cas, err := n.root.CAs(t.Context()); err != nil || len(cas) != 2 {
		t.Errorf("CAs %+v, %v", cas, err)
	}
}

// An agent whose disk takes nothing learns of a new CA all the same, and is not shut
// out when the one before is retired.
func TestRotationWithoutADisk(t *testing.T) {
	n := secure(t)
	a := n.agent(t, "a")
	file := filepath.Join(a.dir, "ca.pem")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(file, "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := n.root.CARotate(t.Context(), api.RotateRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Whoami(t.Context()); err != nil { // says that there is another CA
		t.Fatal(err)
	}
	n.clock.at(time.Minute, func() {
		if _, err := a.Whoami(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := n.root.CARotate(t.Context(), api.RotateRequest{Retire: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Whoami(t.Context()); err != nil {
		t.Errorf("after the CA before was retired: %v", err)
	}
	// When the disk takes something again, it is there for the next start.
	if err := os.RemoveAll(file); err != nil {
		t.Fatal(err)
	}
	n.clock.at(3*time.Minute, func() {
		if _, err := a.Whoami(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := n.open(t, a.dir, "a", "").Whoami(t.Context()); err != nil {
		t.Errorf("after a restart: %v", err)
	}
}

// An agent can be named by its address too, which is no id: whoever revoked "10.0.0.3"
// took a host for shut out that was not.
func TestRevokeByAddress(t *testing.T) {
	for _, address := range []string{"10.0.0.3", "::ffff:10.0.0.3"} {
		t.Run(address, func(t *testing.T) { revokeByAddress(t, address) })
	}
}

func revokeByAddress(t *testing.T, address string) {
	n := secure(t)
	bad := n.agent(t, "bad")
	if _, err := bad.Register(t.Context(), request("bad", "10.0.0.3")); err != nil {
		t.Fatal(err)
	}
	refused(t, n.root.AgentsRevoke(t.Context(), []string{address, "10.0.0.9"}), http.StatusNotFound, "no agent has the address 10.0.0.9; nothing was revoked")
	if _, err := bad.Register(t.Context(), request("bad", "10.0.0.3")); err != nil {
		t.Errorf("after nothing was revoked: %v", err)
	}
	if err := n.root.AgentsRevoke(t.Context(), []string{address}); err != nil {
		t.Fatal(err)
	}
	_, err := bad.Register(t.Context(), request("bad", "10.0.0.3"))
	refused(t, err, http.StatusForbidden, "was revoked")
}

// A coordinator whose clock jumps goes on to be asked over the connections that there
// are. What it certifies then is good for nothing when the clock is right again, and
// does not replace a certificate that is.
func TestRenewalWhileTheClockIsWrong(t *testing.T) {
	for name, off := range map[string]time.Duration{"ahead": 3 * time.Hour, "late": -50 * 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			n, host := secure(t), &clock{}
			var said said
			var client *api.Client
			const age = -25 * 24 * time.Hour // renewed by now in any case
			n.clock.at(age, func() {
				host.at(age, func() {
					token := n.token(t, api.TokenRequest{Role: "agent", Uses: 1, TTLSeconds: 60})
					m, err := pki.OpenMember(pki.MemberOptions{
						Dir: t.TempDir(), Name: "a", Now: host.now, Token: func() (string, error) { return token, nil },
						Log: slog.New(slog.NewTextHandler(&said, nil)),
					})
					if err != nil {
						t.Fatal(err)
					}
					client = newClient(t, n.url, m.Client())
					if _, err := client.Register(t.Context(), request("a", "10.0.0.1")); err != nil {
						t.Fatal(err)
					}
				})
			})
			n.clock.at(off, func() { _, _ = client.Register(t.Context(), request("a", "10.0.0.1")) })
			if !said.has("certificate not renewed") || !said.has("clock") {
				t.Errorf("log: %s", said.text.String())
			}
			if _, err := client.Register(t.Context(), request("a", "10.0.0.1")); err != nil {
				t.Errorf("when the clock is right again: %v", err)
			}
			host.at(2*time.Minute, func() {
				if _, err := client.Register(t.Context(), request("a", "10.0.0.1")); err != nil || !said.has("certificate renewed") {
					t.Errorf("renewed later: %v, log: %s", err, said.text.String())
				}
			})
		})
	}
}
