package coordinator

import "time"

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
func (c *Coordinator) SetSurveyLimit(limit time.Duration) { c.surveys.limit = limit }
