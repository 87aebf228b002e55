//go:build crashpoints

package attach

import (
	"os"

	"golang.org/x/sys/unix"
)

// crash kills the program, as a runtime or the kernel would, when the
// environment names this point, or panics, as a defect of ours would. Only
// builds for tests contain it.
func crash(point string) {
	if os.Getenv("OVERLAY_PANIC") == point {
		panic("at " + point)
	}
	if os.Getenv("OVERLAY_CRASH") != point {
		return
	}
	unix.Kill(os.Getpid(), unix.SIGKILL)
	select {} // until the signal arrives
}
