package pki

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// join gets a certificate for a token, unless there is another one than old by now.
func (m *Member) join(ctx context.Context, base string, old *held) error {
	if err := m.lock(ctx); err != nil {
		return err
	}
	defer m.unlock()
	if m.current() != old {
		return nil
	}
	text, err := "", error(nil)
	if m.o.Token != nil {
		text, err = m.o.Token()
	}
	if err != nil {
		return fmt.Errorf("join token: %w", err)
	}
	if text == "" {
		return errors.New("this host has not joined the cluster; give it a token with --join-token or --join-token-file (overlayctl token create prints one)")
	}
	token, err := ParseToken(text)
	if err != nil {
		return err
	}
	var pinned *x509.Certificate
	t := m.newTransport(func(host string, shown []*x509.Certificate) (err error) {
		if pinned, err = pinnedRoot(host, shown, token.Pin); err != nil {
			return err
		}
		return verifyServer(host, shown, []*x509.Certificate{pinned}, m.o.Now())
	})
	defer t.CloseIdleConnections()
	m.mu.Lock()
	name := m.name
	m.mu.Unlock()
	key, err := m.joiningKey()
	if err != nil {
		return err
	}
	err = m.obtain(ctx, t, base+api.PathJoin, key, func(csr string) any { return api.JoinRequest{Token: text, Name: name, CSR: csr} })
	var refusal *api.Error
	if err == nil || errors.As(err, &refusal) && refusal.Code < 429 {
		m.mu.Lock()
		m.tried = text
		m.mu.Unlock()
	}
	if err != nil {
		return fmt.Errorf("join: %w", err)
	}
	if err := os.Remove(filepath.Join(m.o.Dir, joiningFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.o.Log.Warn("cannot remove the key that has joined", logkey.Err, err)
	}
	who, _ := m.Joined()
	m.o.Log.Info("joined the cluster", logkey.Role, who.Role, logkey.Name, who.Name, logkey.URL, base)
	return nil
}

// renewInTime renews the certificate when it is time.
func (m *Member) renewInTime(ctx context.Context, base string) error {
	due := func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.held != nil && !m.o.Now().Before(m.renewAt)
	}
	if !due() {
		return nil
	}
	select {
	case m.exchange <- struct{}{}:
	default:
		return nil // somebody is at it
	}
	defer m.unlock()
	if !due() {
		return nil
	}
	key, err := newKey()
	if err != nil {
		return err
	}
	err = m.obtain(ctx, m.transport, base+api.PathRenew, key, func(csr string) any { return api.RenewRequest{CSR: csr} })
	if err != nil {
		m.mu.Lock()
		m.renewAt = m.o.Now().Add(min(retryRenewal, max(m.held.leaf.NotAfter.Sub(m.o.Now())/10, time.Second)))
		m.mu.Unlock()
		return err
	}
	m.transport.CloseIdleConnections() // the next ones show the new certificate
	m.o.Log.Info("certificate renewed", logkey.Until, m.current().leaf.NotAfter)
	return nil
}

// joiningKey is the key to join with, the same until the answer has come: whoever
// did not hear the answer asks again, and has not used the token twice.
func (m *Member) joiningKey() (*ecdsa.PrivateKey, error) {
	path := filepath.Join(m.o.Dir, joiningFile)
	if text, err := os.ReadFile(path); err == nil {
		if block, _ := pem.Decode(text); block != nil {
			if key, err := parseKey(block.Bytes); err == nil && checkKey(key.Public()) == nil {
				return key.(*ecdsa.PrivateKey), nil
			}
		}
	}
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	if err := openDir(m.o.Dir); err != nil {
		return nil, err
	}
	return key, conf.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600, "")
}

// obtain has a key certified, and keeps both.
func (m *Member) obtain(ctx context.Context, t *http.Transport, url string, key *ecdsa.PrivateKey, request func(csr string) any) error {
	ctx, cancel := context.WithTimeout(ctx, exchangeTimeout)
	defer cancel()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	body, err := json.Marshal(request(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))))
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxExchange))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		refusal := &api.Error{Code: resp.StatusCode}
		if json.Unmarshal(text, refusal) != nil || refusal.Message == "" {
			refusal.Message = fmt.Sprintf("%s answered %s; is it a coordinator?", url, resp.Status)
		}
		return refusal
	}
	var granted api.JoinResponse
	if err := json.Unmarshal(text, &granted); err != nil {
		return fmt.Errorf("the answer of %s cannot be read: %w", url, err)
	}
	return m.keep(key, granted)
}

func (m *Member) keep(key *ecdsa.PrivateKey, granted api.JoinResponse) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	text := append(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), granted.Certificate...)
	h, err := parseHeld(text, []byte(granted.CA))
	if err != nil {
		return fmt.Errorf("the certificate that was granted: %w", err)
	}
	// The coordinator's clock may be wrong for a moment, on a connection from before. The
	// certificate that we have is good when it is right again, and this one is not.
	if now := m.o.Now(); now.Before(h.leaf.NotBefore) || now.After(h.leaf.NotAfter) {
		return fmt.Errorf("the certificate that was granted is valid from %s to %s, and the clock of this host says %s; set the clocks of this host and of the coordinator right",
			h.leaf.NotBefore.UTC().Format(time.RFC3339), h.leaf.NotAfter.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	err = writeHeld(m.o.Dir, text, []byte(granted.CA))
	if err != nil && m.current() == nil {
		return fmt.Errorf("keep the certificate: %w", err)
	}
	m.set(h)
	if err != nil {
		// The one before may soon be good for nothing, as after ca retire.
		m.o.Log.Warn("cannot keep the certificate that was renewed; it is used until the next start, and renewed again", logkey.Err, err)
		m.mu.Lock()
		m.renewAt = m.o.Now().Add(retryRenewal)
		m.mu.Unlock()
	}
	return nil
}
