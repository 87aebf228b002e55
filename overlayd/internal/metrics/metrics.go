// Package metrics is the numbers a program has for Prometheus and its kin, on
// top of the Prometheus client. ADR 0033.
//
// A number is either counted as things happen (Counter, Durations), or read when
// somebody asks (Page). Each program has a Registry of its own; there is no
// global one.
package metrics

import (
	"context"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Registry is the numbers of one program.
type Registry struct {
	counted  *prometheus.Registry
	handling promhttp.HandlerOpts
	turn     chan struct{} // has a token while somebody reads
}

// New has the build, the Go runtime and the process already.
func New(program, version string) *Registry {
	r := &Registry{counted: prometheus.NewRegistry(), turn: make(chan struct{}, 1)}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "overlay_build_info", Help: "Always 1; the labels say what runs.",
		ConstLabels: prometheus.Labels{"program": program, "version": version},
	})
	build.Set(1)
	r.counted.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Counter only grows; its name ends in _total.
type Counter struct{ vec *prometheus.CounterVec }

// Counter makes a counter with these labels. It panics where the name is taken.
func (r *Registry) Counter(name, help string, labels ...string) Counter {
	c := Counter{prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)}
	r.counted.MustRegister(c.vec)
	return c
}

// Add adds n to the counter with these values of the labels, in their order. To
// add 0 makes it appear.
func (c Counter) Add(n int, values ...string) { c.vec.WithLabelValues(values...).Add(float64(n)) }

// Durations is a histogram of how long something took; its name ends in
// _seconds.
type Durations struct{ vec *prometheus.HistogramVec }

// Durations makes a histogram from half a millisecond to 16 s. It panics where
// the name is taken.
func (r *Registry) Durations(name, help string, labels ...string) Durations {
	d := Durations{prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: name, Help: help, Buckets: prometheus.ExponentialBuckets(0.0005, 2, 16),
	}, labels)}
	r.counted.MustRegister(d.vec)
	return d
}

// Observe adds one duration.
func (d Durations) Observe(took time.Duration, values ...string) {
	d.vec.WithLabelValues(values...).Observe(took.Seconds())
}

// Serve answers one scrape with what was counted and what read puts on the page. One
// is read at a time, whoever asks.
func (r *Registry) Serve(w http.ResponseWriter, req *http.Request, read func(context.Context, *Page)) {
	now := prometheus.NewRegistry()
	page := &Page{}
	select {
	case r.turn <- struct{}{}:
	case <-req.Context().Done():
		return
	}
	func() {
		defer func() { <-r.turn }() // also where it panics
		read(req.Context(), page)
	}()
	now.MustRegister(page)
	promhttp.HandlerFor(prometheus.Gatherers{r.counted, now}, r.handling).ServeHTTP(w, req)
}

// Page is numbers of one moment. It is a collector that does not say beforehand
// what it has.
type Page struct{ metrics []prometheus.Metric }

// Gauge adds a number that goes up and down. Labels are names and values in
// turn; all numbers of one name have the same names.
func (p *Page) Gauge(name, help string, value float64, labels ...string) {
	p.add(prometheus.GaugeValue, name, help, value, labels)
}

// Counter adds a number that only grows; its name ends in _total.
func (p *Page) Counter(name, help string, value float64, labels ...string) {
	p.add(prometheus.CounterValue, name, help, value, labels)
}

// Histogram adds durations that another program has counted, by the upper bounds of
// their buckets in seconds, each with all that took no longer; its name ends in
// _seconds.
func (p *Page) Histogram(name, help string, n uint64, sum time.Duration, upTo map[float64]uint64, labels ...string) {
	names, values := pairs(labels)
	desc := prometheus.NewDesc(name, help, names, nil)
	m, err := prometheus.NewConstHistogram(desc, n, sum.Seconds(), upTo, values...)
	if err != nil { // the scrape fails and says so
		m = prometheus.NewInvalidMetric(desc, err)
	}
	p.metrics = append(p.metrics, m)
}

// Bool adds a gauge that is 1 or 0.
func (p *Page) Bool(name, help string, value bool, labels ...string) {
	number := 0.0
	if value {
		number = 1
	}
	p.add(prometheus.GaugeValue, name, help, number, labels)
}

func (p *Page) add(kind prometheus.ValueType, name, help string, value float64, labels []string) {
	names, values := pairs(labels)
	desc := prometheus.NewDesc(name, help, names, nil)
	m, err := prometheus.NewConstMetric(desc, kind, value, values...)
	if err != nil { // the scrape fails and says so
		m = prometheus.NewInvalidMetric(desc, err)
	}
	p.metrics = append(p.metrics, m)
}

// pairs takes names and values apart.
func pairs(labels []string) (names, values []string) {
	for i := 0; i+1 < len(labels); i += 2 {
		names, values = append(names, labels[i]), append(values, labels[i+1])
	}
	return names, values
}

// Describe makes a Page a prometheus.Collector.
func (p *Page) Describe(chan<- *prometheus.Desc) {}

// Collect makes a Page a prometheus.Collector.
func (p *Page) Collect(to chan<- prometheus.Metric) {
	for _, m := range p.metrics {
		to <- m
	}
}
