package coordinator_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/pki"
)

// A token is good for as many as it says, for as long as it says, whoever is
// fast, and at whichever coordinator.
func TestTokens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	first := startSecure(t, s, path)
	second := startSecure(t, s, path, withToken(first.token(t, api.TokenRequest{Role: "coordinator"})))

	const uses, wanted = 7, 30
	token := first.token(t, api.TokenRequest{Uses: uses})
	var joined atomic.Int32
	var all sync.WaitGroup
	for i := range wanted {
		n := []*secureNode{first, second}[i%2]
		p := n.join(t, fmt.Sprint("host-", i), token)
		all.Go(func() {
			_, err := p.Whoami(t.Context())
			switch {
			case err == nil:
				joined.Add(1)
			case !strings.Contains(err.Error(), "as often as it may be (7)"):
				t.Error(err)
			}
		})
	}
	all.Wait()
	if joined.Load() != uses {
		t.Errorf("%d joined with a token for %d", joined.Load(), uses)
	}
	tokens, err := second.root.Tokens(t.Context())
	left := map[int]int{} // by uses
	for _, info := range tokens {
		left[info.Uses] = info.Left
	}
	if err != nil || len(tokens) != 2 || left[uses] != 0 || left[1] != 0 {
		t.Errorf("tokens %+v, %v", tokens, err)
	}

	old := first.token(t, api.TokenRequest{TTLSeconds: 60})
	first.clock.at(61*time.Second, func() {
		if _, err := first.join(t, "late", old).Whoami(t.Context()); err == nil || !strings.Contains(err.Error(), "the token expired at") {
			t.Errorf("after its time: %v", err)
		}
	})
	for _, bad := range []api.TokenRequest{
		{Role: "king", Uses: 1, TTLSeconds: 1}, {Role: "agent", Uses: 0, TTLSeconds: 1}, {Role: "agent", Uses: 1, TTLSeconds: 0},
		{Role: "agent", Uses: 1 << 30, TTLSeconds: 1}, {Role: "agent", Uses: 1, TTLSeconds: 1 << 40}, {Role: "reader", Uses: 1, TTLSeconds: 1, AgentID: "a"},
		{Role: "agent", Uses: 1, TTLSeconds: 1, AgentID: "a/b"},
	} {
		_, err := first.root.TokenCreate(t.Context(), bad)
		refused(t, err, http.StatusBadRequest)
	}
	refused(t, first.root.TokenRevoke(t.Context(), "nonesuch"), http.StatusNotFound, "overlayctl token list")
}

// Who shows tokens that are none is held up, whatever he shows then.
func TestGuessedTokens(t *testing.T) {
	n := secure(t)
	good := n.token(t, api.TokenRequest{Uses: 5})
	tries := 0
	for limited := false; !limited && tries < 100; tries++ {
		_, err := n.join(t, "guesser", good[:len(good)-6]+"abcde"+string(rune('a'+tries%26))).Whoami(t.Context())
		limited = err != nil && strings.Contains(err.Error(), "too many tokens that were none came from 127.0.0.1")
		if err == nil {
			t.Fatal("a guess was right")
		}
	}
	if tries != 11 {
		t.Errorf("guesses were stopped after %d, want 10", tries-1)
	}
	if _, err := n.join(t, "honest", good).Whoami(t.Context()); err == nil {
		t.Error("the host may go on at once")
	}
	n.clock.at(time.Minute, func() {
		if _, err := n.join(t, "honest", good).Whoami(t.Context()); err != nil {
			t.Errorf("a minute later: %v", err)
		}
	})
}

// A host that lost its key comes back with a token made for it, one whose
// certificate has expired with any.
func TestJoinAgain(t *testing.T) {
	n := secure(t)
	lost := n.agent(t, "host")
	stranger := n.join(t, "host", n.token(t, api.TokenRequest{}))
	if _, err := stranger.Whoami(t.Context()); err == nil || !strings.Contains(err.Error(), "overlayctl token create --agent-id host") {
		t.Errorf("another host with the id: %v", err)
	}
	found := n.join(t, "host", n.token(t, api.TokenRequest{AgentID: "host"}))
	if _, err := found.Whoami(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err := lost.Whoami(t.Context())
	refused(t, err, http.StatusForbidden, "another host joined as agent host")

	// It expires while the host is off; started again with a new token, it joins.
	n.clock.at(31*24*time.Hour, func() {
		_, err := n.open(t, found.dir, "host", "").Whoami(t.Context())
		refused(t, err, http.StatusForbidden, "the certificate expired at")
		back := n.open(t, found.dir, "host", n.token(t, api.TokenRequest{}))
		eventually(t, "to be back", func() bool { _, err = back.Whoami(t.Context()); return err == nil })
	})
}

// withToken is for a coordinator that joins those of a store.
func withToken(token string) func(*pki.Options, *coordinator.Options) {
	return func(o *pki.Options, _ *coordinator.Options) { o.JoinToken = token }
}

// A further coordinator needs the store and a token, and is then as good as the
// first. Without a token it says what it lacks.
func TestSecondCoordinator(t *testing.T) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	s := openStore(t, path)
	first := startSecure(t, s, path)
	open := func(token string) error {
		_, err := pki.Open(t.Context(), pki.Options{Store: s, Dir: filepath.Join(t.TempDir(), "pki"), JoinToken: token, Log: first.log()})
		return err
	}
	wrong := first.token(t, api.TokenRequest{Role: "agent"})
	once := first.token(t, api.TokenRequest{Role: "coordinator"})
	for token, want := range map[string]string{
		"": "start with --join-token and a token of role coordinator", wrong: "want coordinator", once[:len(once)-2] + "aa": "not one of this cluster",
	} {
		if err := open(token); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("with %.9s: %v, want %q", token, err, want)
		}
	}
	second := startSecure(t, s, path, withToken(once))
	if err := open(once); err == nil || !strings.Contains(err.Error(), "as often as it may be (1)") {
		t.Errorf("the token again: %v", err)
	}
	// Its CA is the same, also after a rotation by the other, and so are identities.
	a := second.agent(t, "a")
	if _, err := first.root.CARotate(t.Context(), api.RotateRequest{}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*secureNode{first, second} {
		if _, err := n.open(t, a.dir, "a", "").Whoami(t.Context()); err != nil {
			t.Error(err)
		}
	}
	eventually(t, "both to have the new CA", func() bool { return first.registry.Bundle() == second.registry.Bundle() })
	if err := first.root.AgentsRevoke(t.Context(), []string{"a"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both to refuse the revoked", func() bool {
		_, err := second.open(t, a.dir, "a", "").Whoami(t.Context())
		return err != nil && strings.Contains(err.Error(), "was revoked")
	})
}

// The CA outlives the store, by its copy beside the cluster key.
func TestStoreLostCAKept(t *testing.T) {
	n := secure(t)
	a := n.agent(t, "a")
	n.stop()
	dir := filepath.Join(n.dir, pki.Dir)
	path := filepath.Join(t.TempDir(), "new.db")
	again := startSecure(t, openStore(t, path), path, func(o *pki.Options, _ *coordinator.Options) { o.Dir = dir })
	if _, err := again.open(t, a.dir, "a", "").Whoami(t.Context()); err != nil {
		t.Errorf("after the store was lost: %v", err)
	}
}

// What is in the store, or in a backup of it, makes nobody a member.
func TestStoreHoldsNoSecret(t *testing.T) {
	n := secure(t)
	tokens := []string{n.token(t, api.TokenRequest{}), n.token(t, api.TokenRequest{Role: "coordinator"}), n.token(t, api.TokenRequest{Role: "operator"})}
	n.agent(t, "a")
	key, err := os.ReadFile(filepath.Join(n.dir, pki.Dir, "cluster.key"))
	if err != nil {
		t.Fatal(err)
	}
	n.stop()
	b := content(t, n.path)
	secrets := []string{strings.TrimSpace(string(key)), "PRIVATE KEY"}
	for _, token := range tokens {
		secrets = append(secrets, token[strings.LastIndexByte(token, '_')+1:])
	}
	for _, secret := range secrets {
		if bytes.Contains(b, []byte(secret)) {
			t.Errorf("the store holds %.6s...", secret)
		}
	}
	if !bytes.Contains(b, []byte("pki/tokens/")) {
		t.Error("no token is in the store at all; the test looks at the wrong file")
	}
}

// Keys are for root alone, whatever the umask.
func TestFilesOfKeys(t *testing.T) {
	for _, umask := range []int{0, 0o777} {
		old := syscall.Umask(umask)
		defer syscall.Umask(old)
		n := &secureNode{clock: &clock{}}
		syscall.Umask(old) // the store's directory and the test's
		path := filepath.Join(t.TempDir(), "coordinator.db")
		s := openStore(t, path)
		syscall.Umask(umask)
		n = startSecure(t, s, path)
		a := n.agent(t, "a")
		syscall.Umask(old)
		for path, want := range map[string]os.FileMode{
			filepath.Join(n.dir, "pki"): os.ModeDir | 0o700, filepath.Join(n.dir, "pki", "cluster.key"): 0o600, filepath.Join(n.dir, "pki", "roots.json"): 0o600,
			filepath.Join(n.dir, "coordinator.sock"): os.ModeSocket | 0o600, a.dir: os.ModeDir | 0o700,
			filepath.Join(a.dir, "identity.pem"): 0o600, filepath.Join(a.dir, "ca.pem"): 0o600,
		} {
			if fi, err := os.Stat(path); err != nil || fi.Mode() != want {
				t.Errorf("umask %o: %s: %v %v, want %v", umask, path, fi.Mode(), err, want)
			}
		}
		n.stop()
	}
}

// The store of a cluster with another CA is not taken for ours.
func TestForeignClusterKey(t *testing.T) {
	n := secure(t)
	other := secure(t)
	n.stop()
	other.stop()
	s := openStore(t, filepath.Join(t.TempDir(), "x.db"))
	_, err := pki.Open(t.Context(), pki.Options{Store: s, Dir: filepath.Join(n.dir, pki.Dir), Log: n.log()})
	_, wrong := pki.Open(t.Context(), pki.Options{Store: s, Dir: filepath.Join(other.dir, pki.Dir), Log: n.log()})
	if err != nil || wrong == nil || !strings.Contains(wrong.Error(), "is not the key of the cluster in the store") {
		t.Errorf("%v; %v", err, wrong)
	}
	if err := os.WriteFile(filepath.Join(n.dir, pki.Dir, "cluster.key"), []byte("damaged\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.Open(t.Context(), pki.Options{Store: s, Dir: filepath.Join(n.dir, pki.Dir), Log: n.log()}); err == nil || !strings.Contains(err.Error(), "is damaged; put it back") {
		t.Errorf("a damaged key: %v", err)
	}
	if errors.Is(wrong, os.ErrNotExist) {
		t.Error(wrong)
	}
}

// Who did not hear the answer to his join asks again, and gets in with the one
// use that there was; also when the agent was killed in between.
func TestAnswerToJoinLost(t *testing.T) {
	n := secure(t)
	token := n.token(t, api.TokenRequest{})
	dir := t.TempDir()
	lose := func(p *person) {
		t.Helper()
		if _, err := p.Whoami(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	p := n.open(t, dir, "a", token)
	lose(p)
	// The key is kept until the answer is; put it back as it was before that.
	key := content(t, filepath.Join(dir, "identity.pem"))
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "joining.pem"), key, 0o600), os.Remove(filepath.Join(dir, "identity.pem"))); err != nil {
		t.Fatal(err)
	}
	lose(n.open(t, dir, "a", token))
	if _, err := n.join(t, "b", token).Whoami(t.Context()); err == nil || !strings.Contains(err.Error(), "as often as it may be (1)") {
		t.Errorf("another host with the token: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "joining.pem")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the key after the join: %v", err)
	}

	// A host that was revoked joins again over a connection that shows the old
	// certificate, and is answered on it.
	if err := n.root.AgentsRevoke(t.Context(), []string{"a"}); err != nil {
		t.Fatal(err)
	}
	again := n.open(t, dir, "a", n.token(t, api.TokenRequest{}))
	tries := 0
	eventually(t, "to be back", func() bool { tries++; _, err := again.Whoami(t.Context()); return err == nil })
	if tries != 2 {
		t.Errorf("it took %d requests, want the one that is refused and the next", tries)
	}
}

// A host that was revoked does not come back with what is left of its token.
func TestRevokedStaysOut(t *testing.T) {
	n := secure(t)
	for name, req := range map[string]api.TokenRequest{"any": {Uses: 5}, "bound": {Uses: 5, AgentID: "bound"}} {
		token, dir := n.token(t, req), t.TempDir()
		if _, err := n.open(t, dir, name, token).Whoami(t.Context()); err != nil {
			t.Fatal(err)
		}
		n.clock.at(time.Minute, func() {
			if err := n.root.AgentsRevoke(t.Context(), []string{name}); err != nil {
				t.Fatal(err)
			}
			again := n.open(t, dir, name, token) // as after a restart
			for range 3 {
				if _, err := again.Whoami(t.Context()); err == nil || !strings.Contains(err.Error(), "was revoked at") {
					t.Errorf("%s: %v", name, err)
				}
			}
			if _, err := n.join(t, name, n.token(t, api.TokenRequest{})).Whoami(t.Context()); err != nil {
				t.Errorf("%s with a new token: %v", name, err)
			}
		})
	}
}
