// Package problems keeps what does not work at present and logs each problem
// when it begins, when it becomes another, and when it ends; never in between,
// however often it is met.
package problems

import (
	"log/slog"
	"maps"
	"slices"
	"sync"

	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// Set is the problems of one program or one part of it. It is safe for
// concurrent use.
type Set struct {
	log *slog.Logger

	mu   sync.Mutex
	open map[string]string // text by what does not work
}

// New returns an empty set that logs to log.
func New(log *slog.Logger) *Set { return &Set{log: log, open: map[string]string{}} }

// Report says that what fails with err, or, with nil, that it works. It
// returns whether that differs from the last time.
func (s *Set) Report(what string, err error) (changed bool) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	s.mu.Lock()
	before, open := s.open[what]
	if err == nil {
		delete(s.open, what)
	} else {
		s.open[what] = text
	}
	s.mu.Unlock()
	switch {
	case err == nil && open:
		s.log.Info("recovered", logkey.What, what)
	case err != nil && (!open || before != text):
		s.log.Warn("degraded; trying again", logkey.What, what, logkey.Err, err)
	default:
		return false
	}
	return true
}

// Forget drops the problems for which drop returns true, without a word: what
// they were about is no longer there.
func (s *Set) Forget(drop func(what string) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.open, func(what, _ string) bool { return drop(what) })
}

// Text is what is wrong with what, or nothing.
func (s *Set) Text(what string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open[what]
}

// Lines lists the problems, "what: text", in order.
func (s *Set) Lines() (out []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, what := range slices.Sorted(maps.Keys(s.open)) {
		out = append(out, what+": "+s.open[what])
	}
	return out
}
