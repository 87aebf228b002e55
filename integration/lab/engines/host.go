package engines

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Host is one machine of a Lab.
type Host struct {
	Name string
	ID   string // unique on the machine; cgroups made by a host's engines start with it
	IP   netip.Addr
	IP6  netip.Addr
	Dir  string // its disk; survives a crash
	// Path is put before the standard PATH of what is executed.
	Path []string

	lab  *Lab
	lan  *Host  // nil for the lan itself
	port string // the lan's end of eth0

	mu      sync.Mutex
	init    *exec.Cmd // nil while the host is down
	life    io.Closer // closing it ends the init
	daemons []*Daemon
}

// initScript makes the inside of a host. $D is its disk and $NAME its name.
//
// The mounts live and die with the init. /proc and /sys are mounted anew
// because they show the namespaces of whoever mounted them; the cgroups are
// carried over, since the new /sys covers them. What the engines store is bound
// from the disk, as their layers cannot be put upon another overlay file system.
// /run/netns is mounted upon itself, as "ip netns" and Podman do when they are
// first used: where containerd has namespaces there already at that moment, it
// cannot remove them any more ("device or resource busy").
//
// Debian's packages bring a network of their own, which is taken off the disk
// of a new host: engines would choose it before one whose name comes later. So is
// what libcni cached on this machine: whoever looks for leftovers would find it.
// Everything of a boot is fresh: /run, /dev/shm (Podman's locks), and the boot id.
const initScript = `set -e
hostname "$NAME"
mount --make-rprivate /
mount -t proc proc /proc
mkdir -p "$D/cgroup"
mount --rbind /sys/fs/cgroup "$D/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$D/cgroup" /sys/fs/cgroup
for dir in etc opt usr/local usr/lib/cni var/lib; do
	mkdir -p "$D/upper/$dir" "$D/work/$dir"
	mount -t overlay overlay -o "lowerdir=/$dir,upperdir=$D/upper/$dir,workdir=$D/work/$dir" "/$dir"
done
for dir in docker containerd containerd2 containers; do
	mkdir -p "$D/store/$dir" "/var/lib/$dir"
	mount --bind "$D/store/$dir" "/var/lib/$dir"
done
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/lock /run/netns
mount --bind /run/netns /run/netns
mount --make-shared /run/netns
cp "$D/boot_id" /run/boot_id
mount --bind /run/boot_id /proc/sys/kernel/random/boot_id
if [ ! -e "$D/installed" ]; then
	rm -rf /etc/cni/net.d /var/lib/cni
	mkdir -p /etc/cni/net.d
	touch "$D/installed"
fi
ip link set lo up
echo ready
exec tini -- cat`

// Boot brings the host up, with the disk it had, and plugs it into the
// underlay. Nothing runs on it but its init.
func (h *Host) Boot(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.init != nil {
		return fmt.Errorf("host %s is up already", h.Name)
	}
	if err := h.bootLocked(ctx); err != nil {
		return errors.Join(fmt.Errorf("boot host %s: %w", h.Name, err), h.crashLocked())
	}
	return nil
}

func (h *Host) bootLocked(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Join(h.Dir, "log"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(h.Dir, "boot_id"), []byte(newUUID()+"\n"), 0o444); err != nil {
		return err
	}
	if err := command(ctx, "ip", "netns", "add", h.ID); err != nil {
		return err
	}
	if err := h.startInit(ctx); err != nil {
		return err
	}
	return h.plugIn(ctx)
}

func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func (h *Host) startInit(ctx context.Context) error {
	cmd := exec.Command("nsenter", "--net=/run/netns/"+h.ID, "sh", "-c", initScript)
	cmd.Env = append(h.env(), "D="+h.Dir, "NAME="+h.Name)
	// No cgroup namespace: runc on cgroup v1 would take its root for the real one.
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWPID,
		Setpgid:    true, // ^C is for the tests, which then clean up
	}
	var said bytes.Buffer
	cmd.Stderr = &said
	life, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	h.init, h.life = cmd, life

	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if line != "ready\n" {
		cmd.Process.Kill()
		cmd.Wait()
		return fmt.Errorf("its init said %q instead of ready (%w): %s", line, err, strings.TrimSpace(said.String()))
	}
	return nil
}

// plugIn gives the host its addresses.
func (h *Host) plugIn(ctx context.Context) error {
	a4, a6 := fmt.Sprintf("%s/%d", h.IP, underlay4.Bits()), fmt.Sprintf("%s/%d", h.IP6, underlay6.Bits())
	if h.lan == nil {
		return h.script(ctx, `
			ip link add lan0 type bridge
			ip addr add `+a4+` dev lan0
			ip addr add `+a6+` dev lan0 nodad
			ip link set lan0 up
			ip addr add `+Outside4.String()+`/32 dev lo
			ip addr add `+Outside6.String()+`/128 dev lo`)
	}
	err := h.lan.script(ctx, fmt.Sprintf(`
		ip link add %[1]s type veth peer name eth0 netns %[2]d
		ip link set %[1]s master lan0 up`, h.port, h.init.Process.Pid))
	if err != nil {
		return err
	}
	return h.script(ctx, `
		ip addr add `+a4+` dev eth0
		ip addr add `+a6+` dev eth0 nodad
		ip link set eth0 up
		ip route add default via `+h.lan.IP.String()+`
		ip -6 route add default via `+h.lan.IP6.String())
}

// script runs shell commands in the host's network namespace only: with the
// programs and process numbers of the machine.
func (h *Host) script(ctx context.Context, commands string) error {
	return command(ctx, "nsenter", "--net=/run/netns/"+h.ID, "sh", "-ec", commands)
}

// Unplug cuts the host off the underlay; Plug connects it again.
func (h *Host) Unplug(ctx context.Context) error {
	return h.lan.script(ctx, "ip link set "+h.port+" down")
}

// Plug undoes Unplug.
func (h *Host) Plug(ctx context.Context) error {
	return h.lan.script(ctx, "ip link set "+h.port+" up")
}

// Crash kills every process of the host at once and takes its network away.
// Its disk and its logs stay. A host that is down stays down.
func (h *Host) Crash() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.crashLocked()
}

func (h *Host) crashLocked() error {
	var errs []error
	if h.init != nil {
		h.init.Process.Kill()
		h.init.Wait() // killed: the error says nothing else
		h.life.Close()
		h.init = nil
		for _, d := range h.daemons {
			<-d.done
		}
		h.daemons = nil
	}
	// The kernel removes the pair of eth0 some time after its namespace; the
	// next boot must not find the old one.
	if h.lan != nil && h.lan.Up() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		errs = append(errs, h.lan.script(ctx, "! ip link show "+h.port+" >/dev/null 2>&1 || ip link del "+h.port+" || ! ip link show "+h.port))
	}
	if _, err := os.Stat("/run/netns/" + h.ID); err == nil {
		errs = append(errs, command(context.Background(), "ip", "netns", "del", h.ID))
	}
	return errors.Join(errs...)
}

// Up says whether the host runs.
func (h *Host) Up() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.init != nil
}

// File is the name under which this process finds a file of the host. It holds
// until the host crashes.
func (h *Host) File(path string) string {
	// There is no process 0, hence no such file, while the host is down.
	return filepath.Join(fmt.Sprintf("/proc/%d/root", h.initPID()), path)
}

// initPID is the host's init as the machine numbers it; 0 while it is down.
func (h *Host) initPID() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.init == nil {
		return 0
	}
	return h.init.Process.Pid
}

// Write puts a file onto the host, with the directories above it.
func (h *Host) Write(path, content string) error {
	name := h.File(path)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, []byte(content), 0o644)
}

// Install copies programs of the machine into a directory of the host.
func (h *Host) Install(dir string, programs ...string) error {
	if err := os.MkdirAll(h.File(dir), 0o755); err != nil {
		return err
	}
	for _, p := range programs {
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		// A new file each time: an older copy may be running.
		name := h.File(filepath.Join(dir, filepath.Base(p)))
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.WriteFile(name, b, 0o755); err != nil {
			return err
		}
	}
	return nil
}

func (h *Host) env() []string {
	path := append(append([]string(nil), h.Path...), "/usr/local/sbin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
	return []string{"PATH=" + strings.Join(path, ":"), "HOME=/root", "LC_ALL=C"}
}

// Command prepares a program to run inside the host. When ctx ends it is
// killed, with what it started.
func (h *Host) Command(ctx context.Context, args ...string) *exec.Cmd {
	pid := h.initPID()
	enter := []string{"-t", fmt.Sprint(pid), "-m", "-u", "-i", "-n", "-p", "--"}
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	if pid == 0 {
		cmd.Err = fmt.Errorf("host %s is down", h.Name)
	}
	cmd.Env = h.env()
	cmd.Dir = "/"
	// nsenter stays outside and waits for its child: both must be killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Exec runs a program inside the host and returns what it printed, without
// white space around it. The error of one that fails quotes both its streams.
func (h *Host) Exec(ctx context.Context, args ...string) (string, error) {
	return run(h.Command(ctx, args...), h.Name, args)
}

func run(cmd *exec.Cmd, where string, args []string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	out := strings.TrimSpace(stdout.String())
	if err != nil {
		return out, fmt.Errorf("%s: %s: %w: stdout %q stderr %q", where, strings.Join(args, " "), err,
			out, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}
