package problems

import (
	"bytes"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
)

func TestLoggedAtBeginChangeAndEnd(t *testing.T) {
	var log bytes.Buffer
	s := New(slog.New(slog.NewTextHandler(&log, nil)))
	for _, step := range []struct {
		what    string
		err     error
		changed bool
	}{
		{"files", nil, false},
		{"files", errors.New("disk full"), true},
		{"files", errors.New("disk full"), false},
		{"peers", errors.New("silent"), true},
		{"files", errors.New("read-only"), true},
		{"files", nil, true},
		{"files", nil, false},
		{"files", errors.New("read-only"), true}, // begins anew
	} {
		if changed := s.Report(step.what, step.err); changed != step.changed {
			t.Errorf("Report(%s, %v): changed %t", step.what, step.err, changed)
		}
	}
	if degraded, recovered := strings.Count(log.String(), "degraded"), strings.Count(log.String(), "recovered"); degraded != 4 || recovered != 1 {
		t.Errorf("logged %d times degraded, %d times recovered:\n%s", degraded, recovered, log.String())
	}
	if got, want := s.Lines(), []string{"files: read-only", "peers: silent"}; !slices.Equal(got, want) {
		t.Errorf("lines %q, want %q", got, want)
	}
	s.Forget(func(what string) bool { return what == "peers" })
	if got, want := s.Lines(), []string{"files: read-only"}; !slices.Equal(got, want) {
		t.Errorf("lines %q, want %q", got, want)
	}
}
