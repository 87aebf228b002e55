package openapi

import (
	"encoding/json"
	"net/http"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

const (
	get  = http.MethodGet
	post = http.MethodPost

	lines = "application/x-ndjson"
)

// Operations are all routes of the coordinator but those of the page.
func Operations() []Operation {
	overlay := Param{Name: "overlay", Description: "only of this overlay"}
	agent := Param{Name: "agent", Description: "only of this agent, by id or IP"}
	out := []Operation{
		{Method: get, Path: api.PathMasterState, Summary: "Agents, subnets, bridges and their status, in DC/OS's shape", Answer: conf.MasterState{}},
		{Method: post, Path: api.PathAgentsDelete, Summary: "Give leases back", Request: api.DeleteRequest{}, Answer: conf.MasterState{}},
		{Method: post, Path: api.PathRegister, Summary: "For agents: register, or renew the lease", Request: api.RegisterRequest{}, Answer: conf.Lease{}},
		{Method: post, Path: api.PathStatus, Summary: "For agents: how each overlay fares on the host", Request: api.StatusReport{}, Status: http.StatusNoContent},
		{Method: get, Path: api.PathWatch, Summary: "For agents: the peers, and what changes of them", Answer: api.PeerEvent{}, Kind: lines, Query: []Param{
			{Name: "agent", Description: "who watches"}, {Name: "revision", Description: "go on after it; 0: from a snapshot", Number: true},
			{Name: "run", Description: "that the revision belongs to"}, {Name: "instance", Description: "of the agent"},
		}},
		{Method: get, Path: api.PathAgents, Summary: "Every agent that has a lease", Answer: []api.Agent{}},
		{Method: get, Path: api.PathBackup, Summary: "All that is stored, with a checksum", Kind: lines},
		{Method: post, Path: api.PathPrune, Summary: "Give back leases of agents that were superseded or are long gone", Request: api.PruneRequest{}, Answer: []api.Agent{}},
		{Method: post, Path: api.PathAttachments, Summary: "For agents: what has changed of the host's containers and addresses", Request: api.AttachmentReport{}, Status: http.StatusNoContent},
		{Method: get, Path: api.PathAttachments, Summary: "For coordinators: what agents have reported here", Answer: api.AttachmentLine{}, Kind: lines},
		{Method: get, Path: api.PathContainers, Summary: "The containers of the cluster, in the order of agent IPs", Answer: api.Containers{}, Query: []Param{
			overlay, agent, {Name: "q", Description: "beginning of an id or address, part of a name, or beginning of an overlay's name"},
			{Name: "limit", Description: "how many on one page: 1 to 10,000, 1,000 where it is left out", Number: true}, {Name: "after", Description: "next of the page before"},
		}},
		{Method: get, Path: api.PathAddresses, Summary: "How full the halves of all overlays and agents are", Answer: api.Addresses{}, Query: []Param{overlay, agent}},
		{Method: get, Path: api.PathEvents, Summary: "Server-sent events", Answer: api.Event{}, Kind: "text/event-stream", Query: []Param{
			{Name: "after", Description: "id of an event, 0: all that are remembered; else from now on. Last-Event-ID says the same", Number: true},
			{Name: "follow", Description: "false: end after those that are remembered"},
		}},
		{Method: post, Path: api.PathSurvey, Summary: "Have hosts look: at the ways to each other (ping), or at the way of a packet from a container (explain)", Request: api.Survey{}, Answer: api.SurveyLine{}, Kind: lines},
		{Method: post, Path: api.PathSurveyReport, Summary: "For agents: what the host has seen", Request: api.SurveyReport{}, Status: http.StatusNoContent},
		{Method: get, Path: api.PathOpenAPI, Summary: "This description", Answer: map[string]any{}},
		{Method: get, Path: api.PathHealth, Summary: "200 while the process answers", Answer: map[string]string{}},
		{Method: get, Path: api.PathReady, Summary: "200 while leases can be granted, else 503", Answer: map[string]string{}},
		{Method: get, Path: api.PathMetrics, Summary: "For Prometheus", Kind: "text/plain"},
		{Method: get, Path: api.PathLogLevel, Summary: "What is logged at least", Answer: api.LogLevel{}},
		{Method: post, Path: api.PathLogLevel, Summary: "Change it", Request: api.LogLevel{}, Answer: api.LogLevel{}},
	}
	return append(append(out, networkOperations()...), identityOperations()...)
}

// networkOperations change the configuration, and what is leased.
func networkOperations() []Operation {
	return []Operation{
		{Method: get, Path: api.PathOverlays, Summary: "Every overlay and how much of its pools is leased", Answer: []api.Overlay{}},
		{Method: post, Path: api.PathOverlaysPlan, Summary: "What a configuration would change", Request: api.ConfigRequest{}, Answer: api.NetworkPlan{}},
		{Method: post, Path: api.PathOverlaysApply, Summary: "Change the configuration", Request: api.ConfigRequest{}, Answer: api.NetworkPlan{}},
		{Method: post, Path: api.PathOverlaysDrain, Summary: "Attach nothing new to an overlay", Request: api.OverlayRequest{}, Answer: api.NetworkPlan{}},
		{Method: post, Path: api.PathOverlaysUndrain, Summary: "Attach to an overlay again", Request: api.OverlayRequest{}, Answer: api.NetworkPlan{}},
		{Method: post, Path: api.PathOverlaysRemove, Summary: "Remove an overlay", Request: api.OverlayRequest{}, Answer: api.NetworkPlan{}},
		{Method: get, Path: api.PathReserved, Summary: "The leases that wait for their agents", Answer: []api.Reservation{}},
		{Method: post, Path: api.PathReserved, Summary: "Reserve what the agents of a DC/OS cluster hold", Request: json.RawMessage{}, Answer: api.Imported{}, Query: []Param{
			{Name: "dry_run", Description: "true: only say what would be"},
		}},
		{Method: post, Path: api.PathReservedDrop, Summary: "Give reservations back", Request: api.ReservedDrop{}, Answer: []api.Reservation{}},
	}
}

func identityOperations() []Operation {
	return []Operation{
		{Method: post, Path: api.PathJoin, Summary: "Exchange a token for a certificate", Request: api.JoinRequest{}, Answer: api.JoinResponse{}},
		{Method: post, Path: api.PathRenew, Summary: "Another certificate of the same identity", Request: api.RenewRequest{}, Answer: api.JoinResponse{}},
		{Method: get, Path: api.PathWhoami, Summary: "Who the coordinator takes the asker for", Answer: api.Whoami{}},
		{Method: get, Path: api.PathTokens, Summary: "The tokens, without their secrets", Answer: []api.TokenInfo{}},
		{Method: post, Path: api.PathTokens, Summary: "Make a token", Request: api.TokenRequest{}, Answer: api.TokenCreated{}},
		{Method: post, Path: api.PathTokensRevoke, Summary: "End a token", Request: api.TokenRevoke{}, Status: http.StatusNoContent},
		{Method: post, Path: api.PathAgentsRevoke, Summary: "Refuse the certificates of agents from now on", Request: api.RevokeRequest{}, Status: http.StatusNoContent},
		{Method: get, Path: api.PathCA, Summary: "The CAs that are trusted", Answer: []api.CA{}},
		{Method: post, Path: api.PathCARotate, Summary: "Make a new CA, or end the trust in the old ones", Request: api.RotateRequest{}, Answer: []api.CA{}},
	}
}
