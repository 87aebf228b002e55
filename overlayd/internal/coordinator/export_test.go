package coordinator

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// SetPace has readers take a message in timeout and a second more for every
// rate bytes. Call it before the first stream begins.
func (c *Coordinator) SetPace(timeout time.Duration, rate int) { c.pace = pace{timeout, rate} }

// SetBodyTimeout is how long a request may take to come from now on.
func (c *Coordinator) SetBodyTimeout(timeout time.Duration) { c.body = timeout }

// Routes are "METHOD path" of everything that is served beside the page.
func (c *Coordinator) Routes() (out []string) {
	for _, r := range c.withDescription(c.routes(nil)) {
		out = append(out, r.method+" "+r.path)
	}
	return out
}

// SetSurveyLimit is how long the answers to a survey are waited for from now on.
func (c *Coordinator) SetSurveyLimit(limit time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.surveys.limit = limit
}

// GoUnasked has an agent go whose stream has not sent the order of a survey, and returns
// who is missing when nobody is waited for any longer.
func (c *Coordinator) GoUnasked(t testing.TB, id string) []api.SurveyMissing {
	t.Helper()
	w, err := c.beginWatch(id, api.Known{Instance: "start"})
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.beginSurvey(t.Context(), api.Survey{Kind: api.SurveyPing, ID: "x", SurveyOptions: api.SurveyOptions{Count: 1}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.endSurvey("x")
	if c.surveyed(s) {
		t.Fatal("nobody is waited for")
	}
	asks := c.takeAsks(w)
	c.notSent(w, asks) // the connection broke in the middle
	c.endWatch(id, w)
	select {
	case <-s.changed:
	case <-time.After(time.Minute):
		t.Fatal("who waits is not told")
	}
	if !c.surveyed(s) {
		t.Fatal("it is waited for")
	}
	return slices.Collect(maps.Values(s.missing))
}

// Misread are the agents that are known here otherwise than their records say, and the
// keys of writes that have ended and are remembered.
func (c *Coordinator) Misread(t testing.TB, s store.Store) (wrong []string) {
	t.Helper()
	kvs, _, err := s.List(t.Context(), prefixAgent)
	if err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, kv := range kvs {
		want, err := decodeAgent(kv)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.view.agents[want.id]; !reflect.DeepEqual(want, got) {
			wrong = append(wrong, fmt.Sprintf("%s: %+v, by its record %+v", want.id, got, want))
		}
	}
	return slices.AppendSeq(wrong, maps.Keys(c.view.drafts))
}
