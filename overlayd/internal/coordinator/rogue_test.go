package coordinator_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
)

func dialSocket(path string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
}

// forgery is a request that must be refused.
type forgery struct {
	name         string
	client       *http.Client
	method, path string
	body         string
	code         int
	says         string
}

func csr(t testing.TB, key any, template *x509.CertificateRequest) string {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
}

func newECKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// forged is a certificate that says the same as another one, by a CA of the same
// name, which the rogue made.
func forged(t testing.TB, like tls.Certificate) tls.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(like.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	caKey, key := newECKey(t), newECKey(t)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: leaf.Issuer, SubjectKeyId: leaf.AuthorityKeyId, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestRogueClient: whatever somebody sends who is not who he says, or may not do
// what he asks for, is refused, and not a byte of the store changes.
func TestRogueClient(t *testing.T) {
	n := secure(t)
	n.SetBodyTimeout(200 * time.Millisecond)
	victim := n.agent(t, "victim")
	if _, err := victim.Register(t.Context(), request("victim", "10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	rogue := n.agent(t, "rogue")
	if _, err := rogue.Register(t.Context(), request("rogue", "10.0.0.2")); err != nil {
		t.Fatal(err)
	}
	reader := n.join(t, "reader", n.token(t, api.TokenRequest{Role: "reader"}))
	if _, err := reader.State(t.Context()); err != nil {
		t.Fatal(err)
	}
	forgeries := forgeries(t, n, victim, rogue, reader)
	if len(forgeries) < 24 {
		t.Fatalf("only %d forgeries", len(forgeries))
	}

	before := content(t, n.path)
	for _, f := range forgeries {
		t.Run(f.name, func(t *testing.T) { f.try(t, n.url) })
	}
	t.Run("on the wire", func(t *testing.T) { rogueBytes(t, n, rogue.certificate(t)) })
	if after := content(t, n.path); !bytes.Equal(before, after) {
		t.Error("the store has changed")
	}
	// Those who are who they say go on.
	if _, err := victim.Register(t.Context(), request("victim", "10.0.0.1")); err != nil {
		t.Errorf("the victim: %v", err)
	}
	t.Logf("%d forged requests refused; the store has %d bytes, as before", len(forgeries)+4, len(before))
}

func content(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (f forgery) try(t *testing.T, base string) {
	req, err := http.NewRequestWithContext(t.Context(), f.method, base+f.path, strings.NewReader(f.body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := f.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != f.code || !strings.Contains(string(b), f.says) || !strings.HasPrefix(string(b), `{"error":"`) {
		t.Errorf("%d %s, want %d and %q", resp.StatusCode, b, f.code, f.says)
	}
}

func forgeries(t *testing.T, n *secureNode, victim, rogue, reader *person) []forgery {
	nobody, asRogue, asReader := as(t), as(t, rogue.certificate(t)), as(t, reader.certificate(t))
	registerVictim, registerRogue := encodeJSON(request("victim", "10.0.0.66")), encodeJSON(request("rogue", "10.0.0.66"))
	const deleteVictim, createToken = `{"agents": ["victim"]}`, `{"role": "operator", "ttl_seconds": 60, "uses": 1}`
	const get, post = http.MethodGet, http.MethodPost

	// Certificates that were good once, or will be, or never.
	late := n.agent(t, "late")
	var early, expired *person
	n.clock.at(48*time.Hour, func() { early = n.agent(t, "early") })
	n.clock.at(-40*24*time.Hour, func() { expired = n.agent(t, "expired") })
	if err := n.root.AgentsRevoke(t.Context(), []string{"late"}); err != nil {
		t.Fatal(err)
	}
	first := n.agent(t, "twice")
	again := n.join(t, "twice", n.token(t, api.TokenRequest{AgentID: "twice"}))
	if _, err := again.Whoami(t.Context()); err != nil {
		t.Fatal(err)
	}
	out := []forgery{
		{"nobody registers", nobody, post, api.PathRegister, registerRogue, 401, "join with a token"},
		{"nobody reports", nobody, post, api.PathStatus, `{"agent_id": "victim"}`, 401, "join with a token"},
		{"nobody reports containers", nobody, post, api.PathAttachments, `{"agent_id": "victim"}`, 401, "join with a token"},
		{"nobody reads the containers", nobody, get, api.PathContainers, "", 401, ""},
		{"nobody reads the addresses", nobody, get, api.PathAddresses, "", 401, ""},
		{"nobody follows the events", nobody, get, api.PathEvents, "", 401, ""},
		{"nobody watches", nobody, get, api.PathWatch + "?agent=victim", "", 401, ""},
		{"nobody reads the state", nobody, get, api.PathMasterState, "", 401, ""},
		{"nobody reads metrics", nobody, get, api.PathMetrics, "", 401, ""},
		{"nobody deletes", nobody, post, api.PathAgentsDelete, deleteVictim, 401, ""},
		{"nobody makes a token", nobody, post, api.PathTokens, createToken, 401, ""},
		{"nobody renews", nobody, post, api.PathRenew, `{}`, 401, ""},
		{"nobody looks around", nobody, get, "/v1/secrets", "", 401, ""},
		{"nobody tries methods", nobody, http.MethodPut, api.PathRegister, "", 401, ""},

		{"another's id", asRogue, post, api.PathRegister, registerVictim, 403, "may speak for itself alone"},
		{"another's id, and then the own", asRogue, post, api.PathRegister, `{"agent_id": "rogue", "agent_ip": "10.0.0.66", "agent_id": "victim"}`, 403, "itself alone"},
		{"another's id in capitals", asRogue, post, api.PathRegister, `{"agent_id": "rogue", "agent_ip": "10.0.0.66", "AGENT_ID": "victim"}`, 403, "itself alone"},
		{"another's report", asRogue, post, api.PathStatus, `{"agent_id": "victim"}`, 403, "itself alone"},
		{"another's containers", asRogue, post, api.PathAttachments, `{"agent_id": "victim", "instance": "x", "sequence": 1, "snapshot": true}`, 403, "itself alone"},
		{"an agent reads the containers", asRogue, get, api.PathContainers, "", 403, "may not do that"},
		{"an agent follows the events", asRogue, get, api.PathEvents, "", 403, "may not do that"},
		{"a reader reports containers", asReader, post, api.PathAttachments, `{"agent_id": "victim", "instance": "x", "sequence": 1, "snapshot": true}`, 403, "may not do that"},
		{"another's stream", asRogue, get, api.PathWatch + "?agent=victim", "", 403, "itself alone"},
		{"another's stream, and then the own", asRogue, get, api.PathWatch + "?agent=victim&agent=rogue", "", 403, "itself alone"},
		{"another's address", asRogue, post, api.PathRegister, encodeJSON(request("rogue", "10.0.0.1")), 409, "belongs to agent victim"},
		{"an address in an overlay", asRogue, post, api.PathRegister, encodeJSON(request("rogue", "9.0.0.7")), 400, "lies in overlay dcos"},
		{"another's lease given back", asRogue, post, api.PathAgentsDelete, deleteVictim, 403, "may not do that"},
		{"an agent makes a token", asRogue, post, api.PathTokens, createToken, 403, "may not do that"},
		{"an agent revokes", asRogue, post, api.PathAgentsRevoke, deleteVictim, 403, "may not do that"},
		{"an agent rotates the CA", asRogue, post, api.PathCARotate, `{}`, 403, "may not do that"},
		{"an agent reads the state", asRogue, get, api.PathMasterState, "", 403, "may not do that"},

		{"a reader deletes", asReader, post, api.PathAgentsDelete, deleteVictim, 403, "may not do that"},
		{"a reader plans a configuration", asReader, post, api.PathOverlaysPlan, `{"config": "{}"}`, 403, "may not do that"},
		{"a reader applies a configuration", asReader, post, api.PathOverlaysApply, `{"config": "{}"}`, 403, "may not do that"},
		{"a reader drains an overlay", asReader, post, api.PathOverlaysDrain, `{"name": "dcos"}`, 403, "may not do that"},
		{"an agent ends the draining of an overlay", asRogue, post, api.PathOverlaysUndrain, `{"name": "dcos"}`, 403, "may not do that"},
		{"an agent removes an overlay", asRogue, post, api.PathOverlaysRemove, `{"name": "dcos", "force": true}`, 403, "may not do that"},
		{"nobody applies a configuration", nobody, post, api.PathOverlaysApply, `{"config": "{}"}`, 401, "certificate"},
		{"a reader makes a token", asReader, post, api.PathTokens, createToken, 403, "may not do that"},
		{"a reader registers", asReader, post, api.PathRegister, registerVictim, 403, "may not do that"},

		{"another CA", as(t, forged(t, victim.certificate(t))), post, api.PathRegister, registerVictim, 403, "another CA"},
		{"expired", as(t, expired.certificate(t)), post, api.PathRegister, encodeJSON(request("expired", "10.0.0.66")), 403, "expired at"},
		{"not yet valid", as(t, early.certificate(t)), post, api.PathRegister, encodeJSON(request("early", "10.0.0.66")), 403, "set the clocks right"},
		{"revoked", as(t, late.certificate(t)), post, api.PathRegister, encodeJSON(request("late", "10.0.0.66")), 403, "was revoked"},
		{"replaced", as(t, first.certificate(t)), post, api.PathRegister, encodeJSON(request("twice", "10.0.0.66")), 403, "another host joined as agent twice"},
	}
	return append(out, joins(t, n)...)
}

// joins are attempts to join that must fail.
func joins(t *testing.T, n *secureNode) []forgery {
	request := csr(t, newECKey(t), &x509.CertificateRequest{})
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	broken, _ := pem.Decode([]byte(request))
	broken.Bytes[len(broken.Bytes)-1] ^= 1

	unchecked, _ := pem.Decode([]byte(csr(t, rsaKey, &x509.CertificateRequest{})))
	unchecked.Bytes[len(unchecked.Bytes)-1] ^= 1

	good, used, revoked := n.token(t, api.TokenRequest{Uses: 9}), n.token(t, api.TokenRequest{}), n.token(t, api.TokenRequest{})
	if _, err := n.join(t, "user", used).Whoami(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.root.TokenRevoke(t.Context(), revoked); err != nil {
		t.Fatal(err)
	}
	var old string
	n.clock.at(-2*time.Hour, func() { old = n.token(t, api.TokenRequest{}) })
	other := good[:len(good)-4] + "aaaa"
	if other == good {
		other = good[:len(good)-4] + "bbbb"
	}
	var out []forgery
	for _, j := range []struct {
		name, token, as, csr string
		code                 int
		says                 string
	}{
		{"token that is none", "please", "new", request, 401, "no join token"},
		{"guessed secret", other, "new", request, 401, "not one of this cluster"},
		{"revoked token", revoked, "new", request, 401, "it was revoked"},
		{"used token", used, "new", request, 403, "as often as it may be (1)"},
		{"expired token", old, "new", request, 403, "the token expired at"},
		{"token of a coordinator", n.token(t, api.TokenRequest{Role: "coordinator"}), "new", request, 403, "overlayd coordinator --join-token"},
		{"token of another agent", n.token(t, api.TokenRequest{AgentID: "mine"}), "new", request, 403, "for agent id mine alone"},
		{"id of another", good, "victim", request, 409, "has joined already"},
		{"name with a path", good, "a/../operator/b", request, 400, "name"},
		{"request that is not signed", good, "new", string(pem.EncodeToMemory(broken)), 400, "certificate request"},
		{"request with an RSA key", good, "new", csr(t, rsaKey, &x509.CertificateRequest{}), 400, "ECDSA P-256"},
		{"request with an RSA key, whose signature costs nothing", good, "new", string(pem.EncodeToMemory(unchecked)), 400, "ECDSA P-256"},
		{"no request", good, "new", "", 400, "PEM"},
		{"more than a request", good, "new", request + strings.Repeat("x", 64<<10), 413, "more than 65536 bytes"},
	} {
		out = append(out, forgery{j.name, as(t), http.MethodPost, api.PathJoin, encodeJSON(api.JoinRequest{Token: j.token, Name: j.as, CSR: j.csr}), j.code, j.says})
	}
	return out
}

// rogueBytes are what no HTTP client would send.
func rogueBytes(t *testing.T, n *secureNode, cert tls.Certificate) {
	addr := strings.TrimPrefix(n.url, "https://")
	ask := func(text string) string {
		conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, text) // the server may have answered before it has all
		b, _ := io.ReadAll(conn)
		return string(b)
	}
	register := encodeJSON(request("rogue", "10.0.0.66"))
	hidden := "0\r\n\r\nPOST /v1/register HTTP/1.1\r\nHost: x\r\nContent-Length: " + fmt.Sprint(len(register)) + "\r\n\r\n" + register
	for name, tt := range map[string]struct{ text, want string }{
		"smuggled behind two lengths": {
			"POST /v1/status HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\nConnection: close\r\n\r\n" + hidden, "HTTP/1.1 400"},
		"smuggled behind an unknown coding": {
			"POST /v1/status HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\nConnection: close\r\n\r\n" + hidden, "HTTP/1.1 501"},
		"headers without end": {
			"GET /v1/agents HTTP/1.1\r\nHost: x\r\nX-Long: " + strings.Repeat("x", 64<<10) + "\r\n\r\n", "HTTP/1.1 431"},
		"oversize": {
			"POST /v1/register HTTP/1.1\r\nHost: x\r\nContent-Length: 2097152\r\nConnection: close\r\n\r\n\"" + strings.Repeat("x", 1<<20) + "xxxxx", "HTTP/1.1 413"},
		"slow body": {
			"POST /v1/register HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", "HTTP/1.1 408"},
	} {
		got := ask(tt.text)
		if !strings.HasPrefix(got, tt.want) || strings.Contains(got, "HTTP/1.1 200") {
			t.Errorf("%s: %.300s\nwant %s", name, got, tt.want)
		}
	}
	if conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
		conn.Close()
		t.Error("the server speaks TLS 1.2")
	}
	if resp, err := http.Get("http://" + addr + api.PathHealth); err != nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("plain HTTP: %v %v", resp, err)
	} else {
		resp.Body.Close()
	}
}

// Nothing of a certificate request but its key finds its way into a certificate.
func TestRequestForAnotherRole(t *testing.T) {
	n := secure(t)
	operator, err := url.Parse("overlay://" + n.registry.Domain() + "/operator/root")
	if err != nil {
		t.Fatal(err)
	}
	key := newECKey(t)
	body := encodeJSON(api.JoinRequest{Token: n.token(t, api.TokenRequest{}), Name: "new", CSR: csr(t, key, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "root", OrganizationalUnit: []string{"operator"}}, URIs: []*url.URL{operator}, DNSNames: []string{"coordinator"},
	})})
	resp, err := as(t).Post(n.url+api.PathJoin, "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK || !bytes.Contains(text, []byte(`"role":"agent","name":"new"`)) {
		t.Fatalf("%d %s", resp.StatusCode, text)
	}
	_, rest, _ := strings.Cut(string(text), `"certificate":"`)
	block, _ := pem.Decode([]byte(strings.ReplaceAll(rest, `\n`, "\n")))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if len(cert.URIs) != 1 || cert.URIs[0].Path != "/agent/new" || len(cert.DNSNames) > 0 || cert.IsCA || cert.Subject.CommonName != "new" {
		t.Errorf("the certificate is for %v %v %v", cert.URIs, cert.DNSNames, cert.Subject)
	}
}
