//go:build crashpoints

// Package crashpoint marks the points at which tests kill a daemon. Only builds for
// tests have them.
package crashpoint

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Dir is the variable that names the directory in which a test lays a file for each
// point that the daemon is to die at. It dies once at each: the file goes first.
const Dir = "OVERLAY_CRASH_DIR"

// At kills the daemon, as the kernel would, if a test says so.
func At(point string) {
	dir := os.Getenv(Dir)
	if dir == "" || os.Remove(filepath.Join(dir, point)) != nil {
		return
	}
	unix.Kill(os.Getpid(), unix.SIGKILL)
	select {} // until the signal arrives
}
