package agent

import (
	"testing"

	"golang.org/x/sync/errgroup"
)

// Who saves processor time during the start is told when memory is given back, and need
// not be there.
func TestStarted(t *testing.T) {
	told := 0
	l := &loop{opts: Options{Started: func() { told++ }}, group: new(errgroup.Group)}
	l.giveBack()
	if told != 1 {
		t.Errorf("told %d times", told)
	}
	l.opts.Started = nil
	l.giveBack()
	if err := l.group.Wait(); err != nil {
		t.Error(err)
	}
}
