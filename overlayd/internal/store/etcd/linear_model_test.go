package etcd_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/anishathalye/porcupine"
)

// check looks for one order of everything that was answered: first of what each
// agent was told, then of who owned each subnet and each VTEP address (and with
// it the MAC).
func (l *linear) check() {
	l.t.Logf("%d operations, %d of unknown outcome, in %s", len(l.history), l.unknown, time.Since(l.began).Round(time.Second))
	l.checkModel("agent", agentModel, l.history)
	for what, of := range map[string]func(answer) string{
		"subnet":       func(a answer) string { return a.subnet.String() },
		"VTEP address": func(a answer) string { return a.vtep.String() },
	} {
		// Each resource gets the grants of it, and the deletions of those that had it.
		had := map[string]map[int]bool{}
		for _, op := range l.history {
			r, a := op.Input.(request), op.Output.(answer)
			if r.delete || a.unknown {
				continue
			}
			if had[of(a)] == nil {
				had[of(a)] = map[int]bool{}
			}
			had[of(a)][r.agent] = true
		}
		for resource, agents := range had {
			var history []porcupine.Operation
			for _, op := range l.history {
				r, a := op.Input.(request), op.Output.(answer)
				if agents[r.agent] && (r.delete || !a.unknown && of(a) == resource) {
					history = append(history, op)
				}
			}
			l.checkModel(what+" "+resource, ownerModel, history)
		}
	}
}

func (l *linear) checkModel(what string, model porcupine.Model, history []porcupine.Operation) {
	result, info := porcupine.CheckOperationsVerbose(model, history, time.Minute)
	if result == porcupine.Ok {
		return
	}
	path := filepath.Join(os.TempDir(), "linearizable.html")
	if err := porcupine.VisualizePath(model, info, path); err != nil {
		l.t.Error(err)
	}
	l.t.Errorf("%s: %d operations have no order (%s); see %s", what, len(history), result, path)
}

// leaseState is what one agent has.
type leaseState struct {
	exists, told bool
	subnet       netip.Prefix
	vtep         netip.Addr
}

// agentModel: an agent that has a lease is told that one, until it is deleted.
var agentModel = porcupine.Model{
	Partition: func(history []porcupine.Operation) (parts [][]porcupine.Operation) {
		parts = make([][]porcupine.Operation, linearAgents)
		for _, op := range history {
			agent := op.Input.(request).agent
			parts[agent] = append(parts[agent], op)
		}
		return parts
	},
	Init: func() any { return leaseState{} },
	Step: func(state, input, output any) (bool, any) {
		s, r, a := state.(leaseState), input.(request), output.(answer)
		switch {
		case r.delete:
			return true, leaseState{}
		case a.unknown:
			s.exists = true
			return true, s
		case s.told:
			return s.subnet == a.subnet && s.vtep == a.vtep, s
		}
		return true, leaseState{exists: true, told: true, subnet: a.subnet, vtep: a.vtep}
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v -> %+v", input, output) },
	DescribeState:     func(state any) string { return fmt.Sprintf("%+v", state) },
}

// ownerModel: a resource is granted to nobody else while it has an owner.
var ownerModel = porcupine.Model{
	Init: func() any { return -1 },
	Step: func(state, input, _ any) (bool, any) {
		owner, r := state.(int), input.(request)
		switch {
		case r.delete && owner == r.agent:
			return true, -1
		case r.delete:
			return true, owner
		}
		return owner == -1 || owner == r.agent, r.agent
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v -> %+v", input, output) },
	DescribeState:     func(state any) string { return fmt.Sprint(state) },
}
