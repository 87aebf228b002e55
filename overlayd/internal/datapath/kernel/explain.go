package kernel

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/datapath/plan"
)

// explain adds to a refusal what the kernel does not say.
func explain(o plan.Op, err error) error {
	if o.Obj == plan.LinkUp && o.Overlay == "" && errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("%w: UDP port %d is taken by %s; end it or have it use another port", err, conf.VXLANPort, portHolder(conf.VXLANPort))
	}
	return err
}

// portHolder names the processes that have a UDP socket at the port, in the
// network namespace of the calling thread.
func portHolder(port int) string {
	inodes := map[string]bool{}
	for _, table := range [...]string{"udp", "udp6"} {
		readInodes("/proc/thread-self/net/"+table, port, inodes)
	}
	var names []string
	seen := map[string]bool{}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/[0-9]*")
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if err != nil || !inodes[target] {
			continue
		}
		dir := filepath.Dir(filepath.Dir(fd))
		if seen[dir] {
			continue
		}
		seen[dir] = true
		comm, _ := os.ReadFile(filepath.Join(dir, "comm"))
		names = append(names, fmt.Sprintf("%s (process %s)", strings.TrimSpace(string(comm)), filepath.Base(dir)))
	}
	if len(names) > 0 {
		return strings.Join(names, ", ")
	}
	if len(inodes) > 0 {
		return fmt.Sprintf("a process that cannot be seen from here (ss -lunp sport = %d)", port)
	}
	return fmt.Sprintf("another VXLAN device or tunnel (ip -d link; ss -lunp sport = %d)", port)
}

// readInodes reads which sockets of a table have the port: "socket:[INODE]".
func readInodes(file string, port int, inodes map[string]bool) {
	f, err := os.Open(file)
	if err != nil {
		return // without IPv6 there is one table only
	}
	defer f.Close()
	suffix := fmt.Sprintf(":%04X", port)
	for s := bufio.NewScanner(f); s.Scan(); {
		// sl local_address rem_address st queues timer retransmits uid timeout inode
		fields := strings.Fields(s.Text())
		if len(fields) > 9 && strings.HasSuffix(fields[1], suffix) {
			inodes["socket:["+fields[9]+"]"] = true
		}
	}
}
