package conf

import (
	"fmt"
	"strings"
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
