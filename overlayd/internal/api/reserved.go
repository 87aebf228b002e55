package api

import (
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
)

// Paths of the coordinator about leases that wait for their agents.
const (
	PathReserved     = "/v1/reserved"      // GET []Reservation; POST what DC/OS answers to PathMasterState -> Imported
	PathReservedDrop = "/v1/reserved/drop" // POST ReservedDrop -> []Reservation, those that were dropped
)

// Reservation is a lease that the agent with an address gets when it registers
// first, and nobody else.
type Reservation struct {
	AgentIP netip.Addr       `json:"agent_ip"`
	VTEP    netip.Addr       `json:"vtep"`
	VTEP6   netip.Addr       `json:"vtep6,omitzero"`
	Subnets []ReservedSubnet `json:"subnets"`
}

// ReservedSubnet is the part of one overlay.
type ReservedSubnet struct {
	Overlay string       `json:"overlay"`
	Subnet  netip.Prefix `json:"subnet,omitzero"`
	Subnet6 netip.Prefix `json:"subnet6,omitzero"`
}

// Imported is what has become of the agents of an imported state.
type Imported struct {
	DryRun   bool          `json:"dry_run,omitempty"` // nothing was written
	Reserved []Reservation `json:"reserved"`          // by this import
	Before   []netip.Addr  `json:"before"`            // reserved in the same way before
	Taken    []netip.Addr  `json:"taken"`             // registered already, with the very lease
	Skipped  []string      `json:"skipped,omitempty"` // places of agents that hold nothing
}

// ReservedDrop names reservations by agent IP, or all of them.
type ReservedDrop struct {
	Agents []netip.Addr `json:"agents,omitempty"`
	All    bool         `json:"all,omitempty"`
}

// ImportState reserves what the agents of a DC/OS cluster hold, as its answer to
// PathMasterState says. On any problem nothing is reserved, and the *Error has
// all of them.
func (c *Client) ImportState(ctx context.Context, document json.RawMessage, dryRun bool) (result Imported, err error) {
	path := PathReserved
	if dryRun {
		path += "?dry_run=true"
	}
	err = c.do(ctx, http.MethodPost, path, document, &result)
	return result, err
}

// Reserved lists the leases that wait for their agents.
func (c *Client) Reserved(ctx context.Context) (list []Reservation, err error) {
	err = c.do(ctx, http.MethodGet, PathReserved, nil, &list)
	return list, err
}

// ReservedDrop gives reservations back, and returns those that were there.
func (c *Client) ReservedDrop(ctx context.Context, req ReservedDrop) (dropped []Reservation, err error) {
	err = c.do(ctx, http.MethodPost, PathReservedDrop, req, &dropped)
	return dropped, err
}
