package agent

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// An agent that is killed while the coordinator grants its lease does not hear that the
// coordinator knows this start of it. However many starts come to nothing after that, the
// host shows that it is the same.
func TestKilledWhileRegistering(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	before := h.document().Lease.Epoch
	h.stop()

	// From the coordinator's side an agent that is killed is one that lets go.
	killed := func(what string, at func(http.Handler, *http.Request)) {
		t.Helper()
		reached := make(chan struct{}, 1)
		hook := func(next http.Handler, _ http.ResponseWriter, r *http.Request) {
			at(next, r)
			select {
			case reached <- struct{}{}:
			default:
			}
			<-r.Context().Done() // nothing is answered
		}
		c.register.Store(&hook)
		h.start()
		select {
		case <-reached:
		case <-time.After(15 * time.Second):
			t.Fatal(what + ": not asked for")
		}
		h.stop()
	}
	killed("a lease that is granted", func(next http.Handler, r *http.Request) {
		answer := httptest.NewRecorder()
		next.ServeHTTP(answer, r)
		if answer.Code != http.StatusOK {
			t.Errorf("refused: %d %s", answer.Code, answer.Body)
		}
	})
	for range 2 {
		killed("a lease, by a request that is lost", func(_ http.Handler, r *http.Request) {
			_, _ = r.Body.Read(make([]byte, 1<<20))
		})
	}
	c.register.Store(nil)
	began := time.Now()
	h.start()
	eventually(t, "the host is connected with its lease", func() error {
		agents, err := c.client().Agents(t.Context())
		if err == nil && (len(agents) != 1 || !agents[0].Connected || agents[0].Epoch != before) {
			err = fmt.Errorf("agents: %+v", agents)
		}
		return err
	})
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("the host waited %s for its lease", took)
	}
}
