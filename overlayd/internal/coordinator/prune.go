package coordinator

import (
	"context"
	"math"
	"net/http"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// leastAbsence is the shortest absence for which leases are given back.
const leastAbsence = time.Hour

// Prune gives back the leases of agents that are connected nowhere, and have been
// superseded or were not seen for so long, and returns them. An agent of which
// nobody knows when it was seen counts as seen when this coordinator began.
func (c *Coordinator) Prune(ctx context.Context, req api.PruneRequest) ([]api.Agent, error) {
	absence := time.Duration(min(req.NotSeenSeconds, int64(math.MaxInt64/time.Second))) * time.Second
	if req.NotSeenSeconds < 0 || absence < leastAbsence {
		return nil, refuse(http.StatusBadRequest, "not_seen_seconds %d: want %d at least; an agent that is only away for a while would lose its lease",
			req.NotSeenSeconds, int64(leastAbsence.Seconds()))
	}
	gone := []api.Agent{}
	for _, a := range c.Agents() {
		seen := a.LastSeen
		if seen.IsZero() {
			seen = c.started
		}
		if !a.Connected && (a.Superseded != "" || time.Since(seen) >= absence) {
			gone = append(gone, a)
		}
	}
	if req.DryRun {
		return gone, nil
	}
	for i, a := range gone {
		if err := c.deleteAgent(ctx, a.AgentID); err != nil {
			return gone[:i], err
		}
	}
	return gone, nil
}

func (c *Coordinator) servePrune(w http.ResponseWriter, r *http.Request) error {
	var req api.PruneRequest
	if err := serve.ReadJSON(w, r, &req); err != nil {
		return err
	}
	gone, err := c.Prune(r.Context(), req)
	if err != nil {
		return err
	}
	serve.WriteJSON(w, http.StatusOK, gone)
	return nil
}
