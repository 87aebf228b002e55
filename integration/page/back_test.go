package page

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"testing"

	"overlayd.internal/overlay/integration/lab"
)

// follow opens the stream of an agent's peers, which is what makes it connected, and
// returns what closes it.
func (a *agent) follow(t *testing.T) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.c.url+"/v1/watch?"+url.Values{"agent": {a.id}, "instance": {"one"}}.Encode(), nil)
	must(t, err)
	resp, err := a.c.hc.Do(req)
	must(t, err)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("watch: %s", resp.Status)
	}
	return func() { cancel(); resp.Body.Close() }
}

// connected reports whether the coordinator says so of an agent.
func (c *coordinator) connected(id string) bool {
	c.t.Helper()
	resp, err := c.hc.Get(c.url + "/v1/agents")
	must(c.t, err)
	defer resp.Body.Close()
	type agent struct {
		AgentID   string `json:"agent_id"`
		Connected bool
	}
	var list []agent
	must(c.t, json.NewDecoder(resp.Body).Decode(&list))
	return slices.ContainsFunc(list, func(a agent) bool { return a.AgentID == id && a.Connected })
}

// TestBack: whether an agent was away for less than is told, or was told to be gone, the
// page says that it is back without waiting for its next look at everything.
func TestBack(t *testing.T) {
	br := browser(t)
	c := startCoordinator(t)
	// One for each absence: on a slow machine the brief one may be told as well.
	brief := &agent{c: c, id: "brief", ip: netip.MustParseAddr("172.20.0.1")}
	long := &agent{c: c, id: "long", ip: netip.MustParseAddr("172.20.0.2")}
	ends := map[*agent]func(){}
	for _, a := range []*agent{brief, long} {
		must(t, a.register(t.Context()))
		must(t, a.status(t.Context()))
		must(t, a.report(t.Context(), true, nil, nil, a.usage(0)))
		ends[a] = a.follow(t)
	}

	v := open(t, br, 1280, 800)
	v.visit(c.url + "/")
	v.wait("that all is well", "document.querySelector('.tiles')?.innerText.includes('all connected')")
	const missed = "document.querySelector('.tiles').innerText.includes('1 not connected')"
	ends[brief]()
	// Something has the page read at that moment.
	must(t, lab.Wait(t.Context(), "the coordinator to notice", patience, func() error {
		if c.connected(brief.id) {
			return errors.New("it is connected")
		}
		return nil
	}))
	eval[bool](v, "document.dispatchEvent(new Event('visibilitychange'))")
	v.wait("that it is missed", missed)
	defer brief.follow(t)()
	v.wait("that it is back", "document.querySelector('.tiles').innerText.includes('all connected')")

	ends[long]()
	v.wait("that its going is told", "document.querySelector('main').innerText.includes('agent long at 172.20.0.2 is no longer connected')")
	v.wait("that it is missed again", missed)
	defer long.follow(t)()
	v.wait("that its coming is told", "document.querySelector('main').innerText.includes('agent long at 172.20.0.2 is connected again')")
	v.wait("that it is back again", "document.querySelector('.tiles').innerText.includes('all connected')")
}
