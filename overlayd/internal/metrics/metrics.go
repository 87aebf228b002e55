// Package metrics prints numbers in the text format that Prometheus and its kin
// read. The format is a few lines; a client library is not.
package metrics

import (
	"net/http"
	"strconv"
	"strings"
)

// contentType is that of the text format.
const contentType = "text/plain; version=0.0.4; charset=utf-8"

// Page is the answer to one scrape. All values of one name must follow each
// other.
type Page struct {
	b    strings.Builder
	last string // name of the value before
}

// Gauge adds a number that goes up and down. Labels are names and values in
// turn.
func (p *Page) Gauge(name, help string, value float64, labels ...string) {
	p.add("gauge", name, help, value, labels)
}

// Counter adds a number that only grows; its name ends in _total.
func (p *Page) Counter(name, help string, value float64, labels ...string) {
	p.add("counter", name, help, value, labels)
}

// Bool adds a gauge that is 1 or 0.
func (p *Page) Bool(name, help string, value bool, labels ...string) {
	number := 0.0
	if value {
		number = 1
	}
	p.add("gauge", name, help, number, labels)
}

func (p *Page) add(kind, name, help string, value float64, labels []string) {
	if name != p.last {
		p.b.WriteString("# HELP " + name + " " + help + "\n# TYPE " + name + " " + kind + "\n")
		p.last = name
	}
	p.b.WriteString(name)
	for i := 0; i+1 < len(labels); i += 2 {
		separator := ","
		if i == 0 {
			separator = "{"
		}
		p.b.WriteString(separator + labels[i] + `="` + escape(labels[i+1]) + `"`)
	}
	if len(labels) > 0 {
		p.b.WriteByte('}')
	}
	p.b.WriteString(" " + strconv.FormatFloat(value, 'g', -1, 64) + "\n")
}

// escape is what a label's value needs.
func escape(s string) string {
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s)
}

// String is what was added so far.
func (p *Page) String() string { return p.b.String() }

// Serve answers with the page.
func (p *Page) Serve(w http.ResponseWriter) {
	w.Header().Set("Content-Type", contentType)
	w.Write([]byte(p.String())) // an error means that the client is gone
}
