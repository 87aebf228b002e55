package coordinator_test

import (
	"bytes"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/pki"
)

// shownBy registers as the agent that holds a lease.
func (p *person) shownBy(t testing.TB, l conf.Lease) (conf.Lease, error) {
	t.Helper()
	return p.Register(t.Context(), shows(l))
}

// lost is a secure coordinator of which the store was lost: its keys are in keys, and
// an operator's CA, if there is one, in ca.
func lost(t testing.TB, keys, ca, cluster string) *secureNode {
	t.Helper()
	path := filepath.Join(t.TempDir(), "coordinator.db")
	return startSecure(t, openStore(t, path), path, func(o *pki.Options, c *coordinator.Options) {
		o.Dir, o.OperatorDir = keys, ca
		c.Adopt.Cluster = cluster
	})
}

// The store is lost and the keys are not: agents come with the certificates they
// have, and get back what they hold. What is not theirs, or no lease of this cluster,
// gets them nothing, and changes nothing.
func TestForgedLeases(t *testing.T) {
	keys := filepath.Join(t.TempDir(), pki.Dir)
	path := filepath.Join(t.TempDir(), "coordinator.db")
	n := startSecure(t, openStore(t, path), path, func(o *pki.Options, _ *coordinator.Options) { o.Dir = keys })
	held := func(n *secureNode, id, ip string) (*person, conf.Lease) {
		p := n.agent(t, id)
		l, err := p.Register(t.Context(), request(id, ip))
		if err != nil {
			t.Fatal(err)
		}
		return p, l
	}
	victim, lease := held(n, "victim", "10.0.0.1")
	rogue, own := held(n, "rogue", "10.0.0.2")
	_, foreign := held(secure(t), "rogue", "10.0.0.2")
	n.stop()

	n = lost(t, keys, "", n.ClusterID())
	rogue = n.open(t, rogue.dir, "rogue", "")
	altered := func(from, to string) *conf.SignedLease {
		s := *own.Signed
		if s.Lease = strings.Replace(s.Lease, from, to, 1); s.Lease == own.Signed.Lease {
			t.Fatalf("nothing was altered: %s", s.Lease)
		}
		return &s
	}
	otherCode := *own.Signed
	otherCode.Signatures = [][]byte{bytes.Repeat([]byte{1}, 32), {}, nil}
	before := content(t, n.path)
	for name, f := range map[string]struct {
		shown *conf.SignedLease
		code  int
		words string
	}{
		"altered subnet":          {altered("9.0.1.0/24", "9.0.0.0/24"), 403, "not signed with a key of this cluster"},
		"altered id":              {altered(`"rogue"`, `"other"`), 403, "not signed with a key"},
		"altered epoch":           {altered(`"epoch":`, `"epoch":9`), 403, "not signed with a key"},
		"a field added":           {altered(`{"cluster_id"`, `{"x":1,"cluster_id"`), 403, "not signed with a key"},
		"another signature":       {&otherCode, 403, "not signed with a key"},
		"signed by another key":   {&conf.SignedLease{Lease: own.Signed.Lease, Signatures: foreign.Signed.Signatures}, 403, "not signed with a key"},
		"another agent's":         {lease.Signed, 403, `was granted to agent \"victim\"`},
		"another cluster's":       {foreign.Signed, 403, "not signed with a key"},
		"not signed":              {&conf.SignedLease{Lease: own.Signed.Lease}, 503, "this host shows none"},
		"too large":               {&conf.SignedLease{Lease: strings.Repeat("x", api.MaxPresented+1), Signatures: own.Signed.Signatures}, 400, "at most"},
		"too many signatures":     {&conf.SignedLease{Lease: own.Signed.Lease, Signatures: slices.Repeat(own.Signed.Signatures, 9)}, 400, "at most"},
		"nothing":                 {&conf.SignedLease{Signatures: own.Signed.Signatures}, 403, "not signed with a key"},
		"larger than any request": {&conf.SignedLease{Lease: strings.Repeat("x", 2<<20)}, 413, ""},
	} {
		req := request("rogue", "10.0.0.2")
		req.Presented = f.shown
		t.Run(name, func(t *testing.T) {
			_, err := rogue.Register(t.Context(), req)
			refused(t, err, f.code, strings.ReplaceAll(f.words, `\"`, `"`))
		})
	}
	if after := content(t, n.path); !bytes.Equal(before, after) {
		t.Error("the store has changed")
	}
	for who, l := range map[*person]conf.Lease{n.open(t, victim.dir, "victim", ""): lease, rogue: own} {
		got, err := who.shownBy(t, l)
		if err != nil {
			t.Fatal(err)
		}
		kept(t, l, got)
	}
}

// Leases are signed so that either of two secrets will do to check them, and a
// rotation of the CA does not matter.
func TestWhatLeaseKeysSurvive(t *testing.T) {
	ca := t.TempDir()
	writeCA(t, ca)
	keys := filepath.Join(t.TempDir(), pki.Dir)
	path := filepath.Join(t.TempDir(), "coordinator.db")
	n := startSecure(t, openStore(t, path), path, func(o *pki.Options, _ *coordinator.Options) { o.Dir, o.OperatorDir = keys, ca })
	a := n.agent(t, "a")
	lease, err := a.Register(t.Context(), request("a", "10.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	n.stop()
	adopts := func(n *secureNode) {
		t.Helper()
		a := n.agent(t, "a") // its certificate is of another domain if the keys were lost
		got, err := a.shownBy(t, lease)
		if err != nil {
			t.Fatal(err)
		}
		kept(t, lease, got)
		n.stop()
	}
	t.Run("store lost", func(*testing.T) { adopts(lost(t, keys, ca, lease.ClusterID)) })
	t.Run("store and state directory lost, the operator's CA is there", func(*testing.T) {
		adopts(lost(t, filepath.Join(t.TempDir(), pki.Dir), ca, lease.ClusterID))
	})
	t.Run("store and the operator's CA lost", func(*testing.T) {
		other := t.TempDir()
		writeCA(t, other)
		adopts(lost(t, keys, other, lease.ClusterID))
	})
	t.Run("all lost", func(t *testing.T) {
		n := lost(t, filepath.Join(t.TempDir(), pki.Dir), "", lease.ClusterID)
		_, err := n.agent(t, "a").shownBy(t, lease)
		refused(t, err, http.StatusForbidden, "put cluster.key back", "teardown")
	})
}

func TestLeaseSignedBeforeRotation(t *testing.T) {
	n := secure(t)
	a := n.agent(t, "a")
	lease, err := a.Register(t.Context(), request("a", "10.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		n.clock.at(time.Minute, func() {
			if _, err := n.root.CARotate(t.Context(), api.RotateRequest{}); err != nil {
				t.Fatal(err)
			}
		})
	}
	got, err := a.shownBy(t, lease)
	if err != nil {
		t.Fatal(err)
	}
	sameLease(t, "after rotations", lease, got)
	if slices.EqualFunc(got.Signed.Signatures, lease.Signed.Signatures, bytes.Equal) {
		t.Error("the CA that issues now has not signed")
	}
}
