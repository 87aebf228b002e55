// Package metricstest checks what a scrape answers, for the tests of the programs.
package metricstest

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// Lint fails the test for every name or help text that "promtool check metrics"
// objects to; it is the same linter.
func Lint(t testing.TB, scrape string) {
	t.Helper()
	problems, err := promlint.New(strings.NewReader(scrape)).Lint()
	if err != nil {
		t.Errorf("the scrape cannot be parsed: %v", err)
	}
	for _, p := range problems {
		t.Errorf("metric %s: %s", p.Metric, p.Text)
	}
}
