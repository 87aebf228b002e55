package datapath

import (
	"errors"
	"testing"
)

// Few peers are let in before they are routed to, many meanwhile; and what cannot be
// prepared is not programmed.
func TestInTurn(t *testing.T) {
	failed := errors.New("refused")
	for _, first := range []bool{true, false} {
		for _, ready := range []bool{true, false} {
			letIn, programmed, before := false, false, false
			met := make(chan struct{})
			prepare := func() bool {
				if !first {
					<-met // it must not wait for this one, nor this one for it
				}
				return ready
			}
			result, ok, err := inTurn(prepare, func() { letIn = true; close(met) }, func() (int, error) {
				programmed, before = true, first && letIn
				return 7, failed
			}, first)
			if ok != ready || programmed != ready {
				t.Errorf("first %v, prepared %v: ok %v, programmed %v", first, ready, ok, programmed)
			}
			if ready && (result != 7 || err != failed || before != first || !letIn) {
				t.Errorf("first %v: %d, %v, let in %v, before %v", first, result, err, letIn, before)
			}
		}
	}
}
