package kernel

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

const procSys = "/proc/sys/"

// readSysctls reads the present values of what we want to set; what is not
// there is left out.
func (r *reader) readSysctls() {
	r.Sysctls = map[string]string{}
	for _, s := range r.want.Settings(r.IPv6) {
		if v, ok := readSysctl(s.Key); ok {
			r.Sysctls[s.Key] = v
		}
	}
	if r.Underlay != "" {
		key := plan.ForwardingKey(r.Underlay)
		if v, ok := readSysctl(key); ok {
			r.Sysctls[key] = v
		}
	}
	if !r.IPv6 || !r.want.ListensToRouters(r.Sysctls) {
		return
	}
	for name := range r.Links {
		if v, ok := readSysctl("net/ipv6/conf/" + name + "/accept_ra"); ok && v == "1" {
			r.AcceptRA = append(r.AcceptRA, name)
		}
	}
	slices.Sort(r.AcceptRA)
}

func hasIPv6() bool {
	_, err := os.Stat(procSys + "net/ipv6/conf/all")
	return err == nil
}

// readSysctl reads one value, which is short. A host with hundreds of overlays
// has thousands of them: this costs half of what os.ReadFile does.
func readSysctl(key string) (string, bool) {
	fd, err := unix.Open(procSys+key, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", false
	}
	defer unix.Close(fd)
	var b [64]byte
	n, err := unix.Read(fd, b[:])
	return strings.TrimSpace(string(b[:max(n, 0)])), err == nil
}

func writeSysctl(key, value string) error {
	f, err := os.OpenFile(filepath.Join(procSys, key), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
