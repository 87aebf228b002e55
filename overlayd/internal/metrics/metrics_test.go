package metrics

import (
	"context"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// ours are the lines of a scrape that are not about Go or the process.
func ours(t *testing.T, r *Registry, read func(context.Context, *Page)) string {
	t.Helper()
	w := httptest.NewRecorder()
	r.Serve(w, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil), read)
	if got := w.Header().Get("Content-Type"); w.Code != 200 || !strings.HasPrefix(got, "text/plain; version=0.0.4") {
		t.Fatalf("%d, Content-Type %q: %s", w.Code, got, w.Body)
	}
	var out strings.Builder
	for line := range strings.Lines(w.Body.String()) {
		if strings.Contains(line, "overlay_") {
			out.WriteString(line)
		}
	}
	return out.String()
}

func TestScrape(t *testing.T) {
	r := New("test", "1.2")
	c := r.Counter("overlay_test_things_total", "Things.", "result")
	c.Add(0, "bad")
	c.Add(2, "good")
	d := r.Durations("overlay_test_seconds", "Time.")
	d.Observe(3 * time.Millisecond)
	got := ours(t, r, func(_ context.Context, p *Page) {
		p.Bool("overlay_test_up", "Whether it is.", true)
		p.Gauge("overlay_test_used", "In use.", 3, "overlay", "dcos", "half", "mesos")
		p.Gauge("overlay_test_used", "In use.", 1<<47, "overlay", "a\"b\\c\nd", "half", "docker")
		p.Counter("overlay_test_early_total", "Early.", 1)
	})
	// The buckets of the histogram are the client's business.
	var lines []string
	for line := range strings.Lines(got) {
		if !strings.Contains(line, "_bucket") {
			lines = append(lines, line)
		}
	}
	const want = `# HELP overlay_build_info Always 1; the labels say what runs.
# TYPE overlay_build_info gauge
overlay_build_info{program="test",version="1.2"} 1
# HELP overlay_test_early_total Early.
# TYPE overlay_test_early_total counter
overlay_test_early_total 1
# HELP overlay_test_seconds Time.
# TYPE overlay_test_seconds histogram
overlay_test_seconds_sum 0.003
overlay_test_seconds_count 1
# HELP overlay_test_things_total Things.
# TYPE overlay_test_things_total counter
overlay_test_things_total{result="bad"} 0
overlay_test_things_total{result="good"} 2
# HELP overlay_test_up Whether it is.
# TYPE overlay_test_up gauge
overlay_test_up 1
# HELP overlay_test_used In use.
# TYPE overlay_test_used gauge
overlay_test_used{half="docker",overlay="a\"b\\c\nd"} 1.40737488355328e+14
overlay_test_used{half="mesos",overlay="dcos"} 3
`
	if diff := cmp.Diff(want, strings.Join(lines, "")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Two registries share nothing, so that two programs fit into one process.
func TestRegistriesAreApart(t *testing.T) {
	one, two := New("one", ""), New("two", "")
	one.Counter("overlay_test_total", "Things.").Add(1)
	two.Counter("overlay_test_total", "Things.").Add(5)
	got := ours(t, two, func(context.Context, *Page) {})
	if !strings.Contains(got, "overlay_test_total 5") || strings.Contains(got, `program="one"`) {
		t.Errorf("two has\n%s", got)
	}
}

// A number that cannot be printed fails the scrape; it is not left out silently.
func TestBadNumberFailsTheScrape(t *testing.T) {
	w := httptest.NewRecorder()
	New("test", "").Serve(w, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil), func(_ context.Context, p *Page) {
		p.Gauge("overlay_test", "Test.", 1, "label", "\xff")
	})
	if w.Code != 500 {
		t.Errorf("code %d", w.Code)
	}
}

// Who asks while others are answered waits for his turn: whoever reaches the port
// cannot have everything read and held many times over.
func TestOneReadsAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := New("test", "1.2")
		reading, release := 0, make(chan struct{})
		scrape := func(ctx context.Context) (code int) {
			w := httptest.NewRecorder()
			r.Serve(w, httptest.NewRequestWithContext(ctx, "GET", "/metrics", nil), func(context.Context, *Page) {
				reading++
				<-release
			})
			return w.Code
		}
		ctx, leave := context.WithCancel(t.Context())
		for range 3 {
			go scrape(t.Context())
			synctest.Wait()
		}
		go scrape(ctx)
		synctest.Wait()
		if reading != 1 {
			t.Errorf("%d read at once", reading)
		}
		leave() // who has gone has nothing read
		synctest.Wait()
		for range 3 {
			release <- struct{}{}
			synctest.Wait()
		}
		if reading != 3 {
			t.Errorf("%d have read, want the 3 who have waited", reading)
		}
	})
}
