package coordinator

import (
	"fmt"
	"net/http"
	"time"

	"overlayd.internal/overlay/overlayd/internal/store/transfer"
)

// serveBackup sends everything that is stored, as it was at one revision.
func (c *Coordinator) serveBackup(w http.ResponseWriter, r *http.Request) error {
	content, err := transfer.Read(r.Context(), c.store)
	if err != nil {
		return fmt.Errorf("backup: %w", err)
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store")
	return content.Encode(w, time.Now())
}
