package coordinator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"reflect"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// Report keeps what an agent says about its overlays. It replaces what the
// agent said before; nothing is written when that is the same.
func (c *Coordinator) Report(ctx context.Context, report api.StatusReport) error {
	if err := validateReport(report); err != nil {
		return err
	}
	for attempt := range maxAttempts {
		txn, viewRev, err := c.planReport(report)
		if err != nil || len(txn.Then) == 0 {
			return err
		}
		err = c.commit(ctx, txn)
		if err == nil {
			return nil
		}
		c.dropDrafts(&txn)
		if !errors.Is(err, store.ErrConflict) {
			return fmt.Errorf("report of agent %s: %w", report.AgentID, err)
		}
		if err := c.catchUp(ctx, txn, viewRev, attempt); err != nil {
			return fmt.Errorf("report of agent %s: %w", report.AgentID, err)
		}
	}
	return refuse(http.StatusServiceUnavailable,
		"report of agent %s: the store changed %d times in between; try again", report.AgentID, maxAttempts)
}

func validateReport(report api.StatusReport) error {
	if err := checkAgentID(report.AgentID); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(report.Overlays)) {
		switch s := report.Overlays[name].Status; s {
		case conf.StatusOK, conf.StatusFailed, conf.StatusConfiguring:
		default:
			return refuse(http.StatusBadRequest, "status of overlay %.80q: %.80q is none of %s, %s, %s",
				name, s, conf.StatusOK, conf.StatusFailed, conf.StatusConfiguring)
		}
	}
	return nil
}

// planReport makes the transaction; it is empty when nothing changes.
func (c *Coordinator) planReport(report api.StatusReport) (txn store.Txn, viewRev uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.view.agents[report.AgentID]
	if a == nil {
		return txn, 0, unknownAgent(report.AgentID)
	}
	was := c.view.statuses[report.AgentID]
	old := was.decode()
	now := old
	now.Overlays = nil
	foreign := 0
	for name, s := range report.Overlays {
		if _, ok := c.network().Overlay(name); !ok {
			foreign++
			continue
		}
		if now.Overlays == nil {
			now.Overlays = map[string]conf.OverlayStatus{}
		}
		s.Error = clip(s.Error, maxStatusError)
		now.Overlays[name] = s
	}
	if foreign > 0 { // one line, however many a report holds
		c.log.Warn("agent reports on overlays that are not configured", "agent", a.id, "overlays", foreign)
	}
	if reflect.DeepEqual(old, now) {
		return txn, 0, nil
	}
	key := keyStatus(a.id)
	txn.If = []store.Cond{{Key: keyAgent(a.id), Mod: a.mod}, {Key: key, Mod: was.mod}}
	value := encode(&now)
	txn.Then = []store.Op{{Key: key, Value: value}}
	c.view.drafts[key] = draft{value: value}
	return txn, c.view.rev, nil
}

// dropDrafts is view.dropDrafts.
func (c *Coordinator) dropDrafts(txn *store.Txn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.view.dropDrafts(txn)
}
