package engines

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// labRoot is where labs keep the disks of their hosts: on a real file system,
// which Docker's and Podman's layers need.
const labRoot = "/var/tmp"

// labPrefix starts the name of everything of ours on the machine: directories,
// network namespaces and cgroups.
const labPrefix = "ovl-eng-"

// The underlay, and addresses beyond it which nobody but the lan host knows.
var (
	underlay4 = netip.MustParsePrefix("198.51.100.0/24")
	underlay6 = netip.MustParsePrefix("fd00:c0de::/64")
	Outside4  = netip.MustParseAddr("203.0.113.1")
	Outside6  = netip.MustParseAddr("2001:db8:aa::1")
)

// Lab is an underlay and the hosts on it. It is not safe for concurrent use;
// its hosts are.
type Lab struct {
	// LAN is the host in the middle: it has the underlay's bridge, and is the
	// place for a coordinator.
	LAN *Host
	// Dir has the disks and the logs of all hosts.
	Dir string

	tools  string // directory scripts/engines fills
	images string // archive of both images
	id     string // prefix of all names
	lock   *os.File
	hosts  []*Host
}

// New makes an underlay without hosts, having removed what runs that were
// killed left on the machine. Close removes it. tools is the directory that
// scripts/engines fills.
func New(ctx context.Context, tools string) (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("hosts are made of namespaces and mounts: must be root")
	}
	l, err := claim()
	if err != nil {
		return nil, err
	}
	if err := l.setUp(ctx, tools); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Lab) setUp(ctx context.Context, tools string) (err error) {
	if l.tools, err = filepath.Abs(tools); err != nil {
		return err
	}
	l.images = filepath.Join(l.Dir, "images.tar")
	if err := writeImages(ctx, l.images); err != nil {
		return err
	}
	l.LAN, err = l.add(ctx, "lan", 1)
	return err
}

// claim makes the directory of a lab and locks it for as long as this process
// lives; that lock is how others know that the lab is not a left-over.
func claim() (*Lab, error) {
	guard, err := lockFile(filepath.Join(labRoot, labPrefix+"lock"), syscall.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer guard.Close()
	if err := sweep(); err != nil {
		return nil, fmt.Errorf("remove what an earlier run left: %w", err)
	}
	dir, err := os.MkdirTemp(labRoot, fmt.Sprintf("%s%d-", labPrefix, os.Getpid()))
	if err != nil {
		return nil, err
	}
	// Docker keeps its layers in here and remaps nothing, so others may look in.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	lock, err := lockFile(filepath.Join(dir, "lock"), syscall.LOCK_EX|syscall.LOCK_NB)
	if err != nil {
		return nil, err
	}
	return &Lab{Dir: dir, id: filepath.Base(dir), lock: lock}, nil
}

// AddHost boots a new host and plugs it into the underlay. The first gets the
// addresses ending in 11, the next 12 and so on.
func (l *Lab) AddHost(ctx context.Context, name string) (*Host, error) {
	return l.add(ctx, name, 10+len(l.hosts))
}

func (l *Lab) add(ctx context.Context, name string, number int) (*Host, error) {
	h := &Host{
		Name: name,
		ID:   l.id + "-" + name,
		IP:   nth(underlay4, number),
		IP6:  nth(underlay6, number),
		Dir:  filepath.Join(l.Dir, name),
		lab:  l,
		lan:  l.LAN,
		port: fmt.Sprintf("port%d", number),
	}
	// Known before it runs, so that Close finds a host that booted half-way.
	l.hosts = append(l.hosts, h)
	if err := h.Boot(ctx); err != nil {
		return nil, err
	}
	return h, nil
}

// nth is the n-th address of a prefix, n being less than 256.
func nth(p netip.Prefix, n int) netip.Addr {
	b := p.Addr().AsSlice()
	b[len(b)-1] += byte(n)
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Close crashes all hosts and removes everything that belongs to the lab. It
// may be called twice.
func (l *Lab) Close() error {
	if l.lock == nil {
		return nil
	}
	var errs []error
	for _, h := range slices.Backward(l.hosts) {
		errs = append(errs, h.Crash())
	}
	errs = append(errs, remove(l.id), l.lock.Close())
	l.lock = nil
	return errors.Join(errs...)
}

// sweep removes the labs whose process is gone.
func sweep() error {
	dirs, err := filepath.Glob(filepath.Join(labRoot, labPrefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
			continue
		}
		lock, err := lockFile(filepath.Join(dir, "lock"), syscall.LOCK_EX|syscall.LOCK_NB)
		if errors.Is(err, syscall.EWOULDBLOCK) {
			continue // somebody else's, and alive
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, remove(filepath.Base(dir)), lock.Close())
	}
	return errors.Join(errs...)
}

// remove deletes the namespaces, cgroups and files of a lab none of whose
// processes run any more.
func remove(id string) error {
	var errs []error
	namespaces, _ := filepath.Glob("/run/netns/" + id + "-*")
	for _, ns := range namespaces {
		errs = append(errs, command(context.Background(), "ip", "netns", "del", filepath.Base(ns)))
	}
	cgroups, _ := filepath.Glob("/sys/fs/cgroup/*/" + id + "-*")
	for _, cg := range cgroups {
		errs = append(errs, removeCgroup(cg))
	}
	dir := filepath.Join(labRoot, id)
	errs = append(errs, eventually(10*time.Second, func() error { return os.RemoveAll(dir) }))
	return errors.Join(errs...)
}

// removeCgroup removes a cgroup and those below it. The kernel lets go of a
// cgroup a moment after the last process in it has died.
func removeCgroup(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, d := range slices.Backward(dirs) {
		err := eventually(10*time.Second, func() error {
			if err := syscall.Rmdir(d); err != nil && !errors.Is(err, syscall.ENOENT) {
				return fmt.Errorf("remove cgroup %s: %w", d, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// eventually repeats try until it succeeds, for at most limit, and returns its
// last error. It serves clean-up, which has to go on after a test's context has
// ended.
func eventually(limit time.Duration, try func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return Wait(ctx, try)
}

// Wait repeats try until it succeeds. When ctx ends first it returns the last
// error that is not merely a consequence of that.
func Wait(ctx context.Context, try func() error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		err := try()
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %w", context.Cause(ctx), last)
		case <-tick.C:
		}
	}
}

func lockFile(name string, how int) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), how); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return f, nil
}

// command runs a program outside all hosts.
func command(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
