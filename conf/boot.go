package conf

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// BootID is the kernel's identifier of this boot
// (/proc/sys/kernel/random/boot_id). Containers, and so their addresses, do not
// outlive a boot.
func BootID() (string, error) {
	b, err := ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Boottime is CLOCK_BOOTTIME: the time since boot, suspension included. Zero in
// the impossible case that the kernel does not know.
func Boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
