package coordinator

import (
	"slices"
)

// A run is what the revisions of a store belong to. Every start of a coordinator
// begins a run, written to the store like everything else, so that the store's
// whole history is cut into runs one after the other, whichever coordinator began
// them. A store that is put back as it was before gets a new run at the next
// start, and from then on its revisions belong to another run than the same
// revisions did before.
//
// So a stream's position is a revision and the run that this revision belongs
// to. Any coordinator can continue it, and one that belongs to a history that
// the store no longer has is recognised.
type run struct {
	ID    string `json:"id"`
	Began uint64 `json:"began,omitempty"` // revision; 0 in the last one stored: that of its key
}

// maxRuns is how many runs are remembered. Positions of older ones get a snapshot.
const maxRuns = 200

// runs are consecutive runs, the latest last.
type runs []run

// at returns the run that a revision belongs to; empty when it is no longer
// remembered.
func (rs runs) at(revision uint64) string {
	for _, r := range slices.Backward(rs) {
		if r.Began <= revision {
			return r.ID
		}
	}
	return ""
}

// with returns the runs followed by one more.
func (rs runs) with(r run) runs {
	rs = append(slices.Clone(rs), r)
	return rs[max(0, len(rs)-maxRuns):]
}

func (rs runs) has(id string) bool {
	return slices.ContainsFunc(rs, func(r run) bool { return r.ID == id })
}
