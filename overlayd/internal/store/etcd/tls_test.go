package etcd_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/store/etcd"
	"overlayd.internal/overlay/overlayd/internal/store/etcdtest"
)

// TestTLSRefused: whatever is wrong with certificates is said at the start, with
// what to do, and not as a member that does not answer.
func TestTLSRefused(t *testing.T) {
	const plain = "10.77.0.10:2381"
	c := etcdtest.NewSecure(t, 1, "etcd", "--listen-metrics-urls", "http://"+plain)
	m := c.Members[0]
	hour := time.Now().Add(time.Hour)
	stranger := etcdtest.NewCA(t)
	expired := c.CA.Issue("expired", "127.0.0.1", time.Now().Add(-time.Hour))
	foreign := stranger.Issue("foreign", "127.0.0.1", hour)
	type refusal struct {
		name, endpoint, ca string
		client             etcdtest.Identity
		says               []string
	}
	refuses := func(t *testing.T, tt refusal) {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := etcd.Options{
				Endpoints: []string{tt.endpoint}, Prefix: "/refused", CAFile: tt.ca, CertFile: tt.client.Cert, KeyFile: tt.client.Key,
				Log: slog.New(slog.DiscardHandler),
			}
			says(t, tt.says, func() error {
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				defer cancel()
				s, err := etcd.Open(ctx, o)
				if err == nil {
					s.Close()
					t.Fatal("it was let in")
				}
				return err
			})
		})
	}
	t.Run("at once", func(t *testing.T) {
		for _, tt := range []refusal{
			{"wrong CA", m.URL(), stranger.File, c.Client, []string{"is not signed by the CA in " + stranger.File, "--store-ca"}},
			{"the system's CAs", m.URL(), "", c.Client, []string{"signed by nobody whom this system trusts", "--store-ca"}},
			{"no client certificate", m.URL(), c.CA.File, etcdtest.Identity{}, []string{"demands a certificate", "--store-cert and --store-key"}},
			{"expired client certificate", m.URL(), c.CA.File, expired, []string{"refuses the client certificate in " + expired.Cert, "has expired on "}},
			{"client certificate of another CA", m.URL(), c.CA.File, foreign, []string{"refuses the client certificate in " + foreign.Cert, "--trusted-ca-file"}},
			{"a port without TLS", "https://" + plain, c.CA.File, c.Client, []string{"does not speak TLS", "http://"}},
		} {
			refuses(t, tt)
		}
	})
	c.CA.Issue(m.Name, m.IP, time.Now().Add(-time.Hour)) // etcd reads it at each handshake
	refuses(t, refusal{"expired certificate of a member", m.URL(), c.CA.File, c.Client, []string{"its certificate has expired, or the clock of this host is wrong"}})
}

// says waits until an error contains all of some words.
func says(t *testing.T, words []string, f func() error) {
	t.Helper()
	var err error
	eventually(t, fmt.Sprintf("it says %q", words), func() bool {
		err = f()
		return err != nil && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(err.Error(), w) })
	})
	t.Log(err)
}

// TestTLSExpires: the certificate of the store expires while it is in use. A
// connection that is there goes on; when it breaks, the store says why it has no
// other, and goes on by itself as soon as there is a new certificate.
func TestTLSExpires(t *testing.T) {
	c := etcdtest.NewSecure(t, 1, "etcd")
	s := openSecure(t, c, "/expires")
	f := follow(t, s)
	c.CA.Issue(storeName, "127.0.0.1", time.Now().Add(-time.Hour))
	put(t, s, "k", "before")
	c.Members[0].Kill()
	c.Members[0].Restart()
	says(t, []string{"no member of etcd can serve", "refuses the client certificate in ", "has expired on "}, func() error { return s.Ready(t.Context()) })
	c.CA.Issue(storeName, "127.0.0.1", time.Now().Add(time.Hour))
	eventually(t, "it is ready again", func() bool { return s.Ready(t.Context()) == nil })
	put(t, s, "k", "after")
	eventually(t, "the watch goes on", func() bool { return f.has("before") && f.has("after") })
}

// storeName is whom the certificate of openSecure names.
const storeName = "store"

func openSecure(t testing.TB, c *etcdtest.Cluster, prefix string) *etcd.Store {
	t.Helper()
	own := c.CA.Issue(storeName, "127.0.0.1", time.Now().Add(time.Hour))
	s, err := etcd.Open(t.Context(), etcd.Options{
		Endpoints: c.Endpoints(), Prefix: prefix, CAFile: c.CA.File, CertFile: own.Cert, KeyFile: own.Key, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}
