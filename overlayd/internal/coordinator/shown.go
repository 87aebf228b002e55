package coordinator

import (
	"encoding/json"
	"fmt"
	"net/http"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// maxSignatures bounds what is compared for a lease that is shown.
const maxSignatures = 8

// maxEpoch is more than milliseconds since 1970 and revisions make in all time.
const maxEpoch = 1 << 60

// maxAhead is how far, in milliseconds, an epoch that proves a loss may be above the
// time where nobody signs leases: one made up must not take up what there is of epochs.
const maxAhead = 1 << 41

// shownLease is what an agent shows.
type shownLease struct {
	*conf.Lease
	claim uint64
}

// shownBy is what an agent shows that was checked; nil: nothing. A lease that was
// signed before claims were has its epoch for one.
func shownBy(req *api.RegisterRequest) *shownLease {
	if req.Shown == nil {
		return nil
	}
	s := &shownLease{req.Shown, req.Shown.Epoch}
	var c struct{ Claim uint64 }
	if json.Unmarshal([]byte(req.Presented.Lease), &c) == nil && c.Claim != 0 {
		s.claim = min(s.claim, c.Claim)
	}
	return s
}

// checkShown reads the lease that the agent shows, and refuses one that is none of
// this cluster's for this agent. Without identities it is believed, as is everything
// else. One without a signature, from when the cluster had no identities, counts for
// nothing.
func (c *Coordinator) checkShown(req *api.RegisterRequest) error {
	s := req.Presented
	req.Shown = nil
	if s == nil || c.identity != nil && len(s.Signatures) == 0 {
		return nil
	}
	forged := func(format string, args ...any) error {
		return &api.Error{Code: http.StatusForbidden, Kind: api.KindForgedLease,
			Message: fmt.Sprintf("agent %s shows a lease that "+format+"; nothing was leased", append([]any{req.AgentID}, args...)...)}
	}
	var l conf.Lease
	switch {
	case len(s.Lease) > api.MaxPresented || len(s.Signatures) > maxSignatures:
		return refuse(http.StatusBadRequest, "agent %s shows a lease of %d bytes and %d signatures; at most %d and %d are read",
			req.AgentID, len(s.Lease), len(s.Signatures), api.MaxPresented, maxSignatures)
	case c.identity != nil && !c.identity.SignedLease(s.Lease, s.Signatures):
		return forged("was not signed with a key of this cluster; put cluster.key back into the state directory of the coordinator, in pki, if it was lost, " +
			"or, when the containers of the host may get other addresses, run overlayd agent teardown there and start it again")
	case json.Unmarshal([]byte(s.Lease), &l) != nil || l.Epoch > maxEpoch:
		return forged("cannot be read")
	case l.AgentID != req.AgentID:
		return forged("was granted to agent %.80q", l.AgentID)
	case l.ClusterID != c.clusterID:
		return refuseKind(api.KindOtherCluster,
			"this coordinator is of cluster %s, and agent %s shows a lease of cluster %.80q; nothing was leased", c.clusterID, req.AgentID, l.ClusterID)
	}
	req.Shown = &l
	return nil
}
