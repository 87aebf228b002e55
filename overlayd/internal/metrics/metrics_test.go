package metrics

import (
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPage(t *testing.T) {
	var p Page
	p.Bool("up", "Whether it is.", true)
	p.Gauge("used", "In use.", 3, "overlay", "dcos", "half", "mesos")
	p.Gauge("used", "In use.", 1<<47, "overlay", "dcos", "half", "docker")
	p.Counter("early_total", "Early.", 0, "odd", "a\"b\\c\nd")
	const want = `# HELP up Whether it is.
# TYPE up gauge
up 1
# HELP used In use.
# TYPE used gauge
used{overlay="dcos",half="mesos"} 3
used{overlay="dcos",half="docker"} 1.40737488355328e+14
# HELP early_total Early.
# TYPE early_total counter
early_total{odd="a\"b\\c\nd"} 0
`
	if diff := cmp.Diff(want, p.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	w := httptest.NewRecorder()
	p.Serve(w)
	if got := w.Header().Get("Content-Type"); got != contentType || w.Body.String() != want {
		t.Errorf("Content-Type %q, body\n%s", got, w.Body)
	}
}
