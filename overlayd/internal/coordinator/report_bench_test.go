package coordinator_test

import (
	"bytes"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// BenchmarkReport is what a report of 20 containers costs a coordinator, all but the
// connection.
func BenchmarkReport(b *testing.B) {
	n := start(b, newStore(b), seedNetwork)
	lease := n.register(b, nth(1))
	report := api.AttachmentReport{AgentID: lease.AgentID, Snapshot: true, Usage: usageOf(lease, 20, 0)}
	for i := range 20 {
		a := containerOf(lease, i)
		a.Since = 1
		report.Put = append(report.Put, a)
	}
	handler := n.Handler()
	var bodies [][]byte
	for i := range 100 {
		report.Instance, report.Sequence = fmt.Sprint(i), 1
		body, err := api.PackReport(report)
		if err != nil {
			b.Fatal(err)
		}
		bodies = append(bodies, body)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		req := httptest.NewRequest(http.MethodPost, api.PathAttachments, bytes.NewReader(bodies[i%len(bodies)]))
		req.Header.Set("Content-Encoding", "gzip")
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, req)
		if w.Code != http.StatusNoContent {
			b.Fatalf("%d %s", w.Code, w.Body)
		}
	}
}
