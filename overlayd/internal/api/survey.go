package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"time"
)

// Paths of surveys: what hosts see of each other, asked of their agents.
const (
	PathSurvey       = "/v1/survey"        // POST Survey -> stream of SurveyLine
	PathSurveyReport = "/v1/survey/report" // POST SurveyReport -> 204
)

// SurveyKind is what agents are to look at. There are no others, and none of them
// runs a command.
type SurveyKind string

// The kinds.
const (
	SurveyPing    SurveyKind = "ping"    // the ways to other hosts
	SurveyExplain SurveyKind = "explain" // the way of a packet from this host, or at its end on this host
)

// Bounds of a survey.
const (
	// MaxSurveyed is how many hosts one survey asks, and how many each measures.
	MaxSurveyed = 256
	// MaxSurveyCount is how many probes are sent to each host.
	MaxSurveyCount = 100
	// MinSurveyWait and MaxSurveyWait bound how long an answer to a probe is waited for.
	MinSurveyWait = 10 * time.Millisecond
	MaxSurveyWait = 1500 * time.Millisecond
	// SurveyParallel is how many hosts an agent measures at once, SurveyPause what lies
	// between two probes to one, and SurveySearch how many probes find the largest
	// packet, at most: 15 sizes, twice each, up to an MTU of 9000.
	SurveyParallel = 128
	SurveyPause    = 20 * time.Millisecond
	SurveySearch   = 30
	// SurveyTime is how long an agent may take. SurveyLimit is how long all of them
	// are waited for.
	SurveyTime  = 60 * time.Second
	SurveyLimit = SurveyTime + 10*time.Second
	// MaxSurveyText bounds a name, and a sentence in an answer.
	MaxSurveyText = 1000
	// MaxSurveySteps bounds the steps of an explanation.
	MaxSurveySteps = 50
)

// Survey asks hosts what they see.
type Survey struct {
	Kind SurveyKind `json:"kind"`
	// Agents are the hosts that are asked, by id or IP; empty: all of them. Of a
	// ping each measures the ways to all the others of them.
	Agents []string `json:"agents,omitempty"`
	SurveyOptions
	// Here asks only those that are connected to the coordinator that gets this: so
	// coordinators ask each other.
	Here bool `json:"here,omitempty"`
	// ID is that of the survey of another coordinator that this is part of.
	ID string `json:"id,omitempty"`
	// Run is that of the coordinator that is meant, of a part: another one that has
	// its address refuses it with 503.
	Run string `json:"run,omitempty"`
	// Targets are the ids of the hosts that a part measures, where they are others
	// than those that are asked.
	Targets []string `json:"targets,omitempty"`
}

// SurveyOptions say how to look.
type SurveyOptions struct {
	Count  int    `json:"count,omitempty"`   // of ping: probes to each; 0: 5
	WaitMS int    `json:"wait_ms,omitempty"` // of ping: how long an answer is waited for; 0: 1000, or less where that takes too long
	A      string `json:"a,omitempty"`       // of explain: a container of the host, or an address
	B      string `json:"b,omitempty"`       // of explain: an address, or a container of the host
	// Arrive, of explain: the host that is asked is that of B, and walks where the packet
	// arrives. A and B are addresses.
	Arrive bool `json:"arrive,omitempty"`
}

// MostWait is how long each answer of a ping can be waited for at most, so that an
// agent has measured so many hosts in SurveyTime even if nothing is answered.
func (o SurveyOptions) MostWait(targets int) time.Duration {
	batches := (max(targets, 1) + SurveyParallel - 1) / SurveyParallel
	return (SurveyTime/time.Duration(batches) - time.Duration(o.Count)*SurveyPause) / time.Duration(o.Count+1+SurveySearch)
}

// SurveyOrder is a survey as it goes to one agent, over its stream of peers.
type SurveyOrder struct {
	ID      string     `json:"id"`
	Kind    SurveyKind `json:"kind"`
	Targets []string   `json:"targets,omitempty"` // of ping: agent ids
	SurveyOptions
}

// SurveyReport is what one agent has seen.
type SurveyReport struct {
	AgentID string     `json:"agent_id"`
	AgentIP netip.Addr `json:"agent_ip,omitzero"` // the coordinator fills it in
	ID      string     `json:"id"`
	// Run is that of the coordinator that another one hands this on to.
	Run string `json:"run,omitempty"`
	// Error says why it has not looked. Ways that it measured before may be there.
	Error   string       `json:"error,omitempty"`
	Ways    []Way        `json:"ways,omitempty"`
	Explain *Explanation `json:"explain,omitempty"`
}

// Speaker is the id of the agent that a request speaks for.
func (r SurveyReport) Speaker() string { return r.AgentID }

// SurveyLine is one line of the answer. An empty one is a heartbeat.
type SurveyLine struct {
	Asked  int           `json:"asked,omitempty"` // in the first line: how many hosts are to answer
	Report *SurveyReport `json:"report,omitempty"`
	// Done: nothing follows. Missing are the hosts that have not answered.
	Done    bool            `json:"done,omitempty"`
	Missing []SurveyMissing `json:"missing,omitempty"`
}

// SurveyMissing is a host that has not answered.
type SurveyMissing struct {
	AgentID string     `json:"agent_id"`
	AgentIP netip.Addr `json:"agent_ip"`
	Reason  string     `json:"reason"`
}

// Way is what was measured of the way from one host to an address, and back.
type Way struct {
	From     netip.Addr `json:"from"` // agent IP
	To       netip.Addr `json:"to"`   // agent IP
	AgentID  string     `json:"agent_id"`
	Address  netip.Addr `json:"address"`
	Sent     int        `json:"sent"`
	Received int        `json:"received"`
	Loss     float64    `json:"loss_percent"`
	Min      float64    `json:"rtt_min_ms,omitempty"`
	Avg      float64    `json:"rtt_avg_ms,omitempty"`
	Max      float64    `json:"rtt_max_ms,omitempty"`
	PathMTU  int        `json:"path_mtu,omitempty"` // 0: not measured, for nothing was answered
	MTU      int        `json:"mtu"`                // what it should be
}

// Whole reports whether everything arrives that should.
func (w Way) Whole() bool { return w.Received == w.Sent && w.PathMTU >= w.MTU }

// Explanation is what became of the walk along the way of a packet.
type Explanation struct {
	From      string     `json:"from"`
	To        string     `json:"to"`
	Host      netip.Addr `json:"host,omitzero"` // agent IP of the host that has walked
	Reachable bool       `json:"reachable"`
	StopsAt   string     `json:"stops_at"` // the step, what is wrong there, and what to do; empty: nothing
	Steps     []Step     `json:"steps"`
	// Silent: it stops because nobody answered, so that the cause may be elsewhere.
	Silent bool `json:"silent,omitempty"`
	// FromAddress and ToAddress are of one family; ToHost is the agent IP of the host that
	// has ToAddress, where that is another one.
	FromAddress netip.Addr `json:"from_address,omitzero"`
	ToAddress   netip.Addr `json:"to_address,omitzero"`
	ToHost      netip.Addr `json:"to_host,omitzero"`
	// Far is what ToHost has seen; nil: it was not asked, and FarUnknown says why.
	Far        *Explanation `json:"far,omitempty"`
	FarUnknown string       `json:"far_unknown,omitempty"`
	// NamesUnknown says why it is not known whether a container of another host is called
	// like one of this host that was named; empty: it is known.
	NamesUnknown string `json:"names_unknown,omitempty"`
}

// Step is one part of the way.
type Step struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	Text string `json:"text"`
}

// errSurveyCut: the coordinator ended before all hosts had answered or the time was up.
var errSurveyCut = errors.New("the coordinator ended the survey")

// Survey asks hosts, and calls fn for every line of the answer, the last of which is
// Done. With one that fn fails at it ends.
func (c *Client) Survey(ctx context.Context, survey Survey, fn func(SurveyLine) error) error {
	body, err := json.Marshal(survey)
	if err != nil {
		return fmt.Errorf("survey: %w", err)
	}
	err = c.try(ctx, func(base string, limit, silence time.Duration) (bool, error) {
		return c.openWith(ctx, stream{
			method: http.MethodPost, target: base + PathSurvey, body: bytes.NewReader(body),
			kind: "application/x-ndjson", limit: limit, silence: silence,
		}, func(r *receivedReader) error {
			lines := json.NewDecoder(r)
			for {
				var line SurveyLine
				if err := lines.Decode(&line); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
					return errSurveyCut
				} else if err != nil {
					return err
				}
				if err := fn(line); err != nil || line.Done {
					return err
				}
			}
		})
	})
	if err != nil {
		return fmt.Errorf("survey: %w", err)
	}
	return nil
}

// ReportSurvey tells what an agent has seen.
func (c *Client) ReportSurvey(ctx context.Context, report SurveyReport) error {
	return c.do(ctx, http.MethodPost, PathSurveyReport, report, nil)
}
