// Package lab builds hosts on one machine: network namespaces on an underlay
// bridge, each with directories of its own, in which the real programs run.
//
//	     ┌─────────────── namespace <lab>-lan: bridge "lan" ───────────────┐
//	     │                      │                      │                   │
//	eth0 172.17.0.2        eth0 172.17.0.4        eth0 172.17.0.3     eth0 172.17.0.200
//	     fd00:172:17::2         fd00:172:17::4         fd00:172:17::3      fd00:172:17::200
//	<lab>-h0               <lab>-h1               <lab>-h2            <lab>-outside
//	                            │ m-dcos d-dcos ...
//	                       <lab>-h1-c1, ...: containers
//
// Nothing of the machine itself is touched: its links, addresses, firewall and
// sysctls stay as they are. Everything a lab makes carries the lab's name,
// ovl<pid>, and is removed by Close, and also when the process that made it
// dies in any other way.
//
// The package knows the programs only from outside: command lines, files, HTTP.
package lab

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// removeScript removes a lab by name: processes, namespaces, directory.
//
//go:embed remove.sh
var removeScript string

// Options of a lab.
type Options struct {
	Bin     string // directory of overlayd and the CNI programs
	CNITool string // the program cnitool
	// Keep leaves the lab up when the process ends and on Close; Remove takes
	// it down.
	Keep bool
	// Secure has coordinator and agents identify themselves, as they do by
	// default; without it they run with --insecure.
	Secure bool
	// Etcd keeps the leases in etcd, for two coordinators; without it one
	// coordinator has them in a file. It needs Secure.
	Etcd bool
}

// Lab is one underlay with its hosts. Its methods may be called concurrently.
type Lab struct {
	Name string // ovl<pid>, or ovl<pid>.2 and so on for further ones
	Dir  string // everything on disk
	LAN  *Netns // the namespace of the underlay bridge

	Bin, CNITool string // absolute paths; see Options

	keep   bool
	secure bool
	etcd   bool
	reaper *reaper

	mu      sync.Mutex
	procs   []*Proc
	closers []io.Closer // sockets of this process in the lab's namespaces
}

// New makes the underlay, and removes what labs of dead processes left behind.
// It needs root.
func New(ctx context.Context, o Options) (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("must be root: the lab is made of network namespaces")
	}
	if err := Sweep(ctx); err != nil {
		return nil, err
	}
	l := &Lab{keep: o.Keep, secure: o.Secure, etcd: o.Etcd}
	var err error
	if l.Bin, err = filepath.Abs(o.Bin); err != nil {
		return nil, err
	}
	if l.CNITool, err = filepath.Abs(o.CNITool); err != nil {
		return nil, err
	}
	if l.Name, l.Dir, err = makeDir(); err != nil {
		return nil, err
	}
	if o.Keep {
		err = os.WriteFile(filepath.Join(l.Dir, keepFile), nil, 0o644)
	} else {
		l.reaper, err = startReaper(l.Name)
	}
	if err != nil {
		return nil, errors.Join(err, Remove(ctx, l.Name))
	}
	if err := l.makeLAN(ctx); err != nil {
		return nil, errors.Join(err, l.remove(ctx))
	}
	return l, nil
}

// makeDir takes the first free name: the directory is the claim to it.
func makeDir() (name, dir string, err error) {
	for n := 1; ; n++ {
		name = fmt.Sprintf("ovl%d", os.Getpid())
		if n > 1 {
			name += "." + strconv.Itoa(n)
		}
		dir = dirOf(name)
		if err = os.Mkdir(dir, 0o755); !errors.Is(err, os.ErrExist) {
			return name, dir, err
		}
	}
}

func dirOf(name string) string { return filepath.Join(os.TempDir(), name) }

func (l *Lab) makeLAN(ctx context.Context) (err error) {
	if l.LAN, err = l.Netns(ctx, "lan"); err != nil {
		return err
	}
	// Without snooping, neighbour discovery needs no multicast querier.
	return l.LAN.Configure(ctx, "link add name lan up type bridge mcast_snooping 0")
}

// Close stops every process of the lab and removes all of it. With Options.Keep
// it only closes the sockets this process has in there.
func (l *Lab) Close() error {
	l.mu.Lock()
	closers := l.closers
	l.closers = nil
	l.mu.Unlock()
	for _, c := range closers {
		c.Close()
	}
	if l.keep {
		return nil
	}
	// One that was started just now may not have entered its namespace yet, where
	// remove looks for it.
	l.mu.Lock()
	procs := slices.Clone(l.procs)
	l.mu.Unlock()
	for _, p := range procs {
		p.Kill()
	}
	return l.remove(context.Background())
}

func (l *Lab) remove(ctx context.Context) error {
	if l.reaper != nil {
		return l.reaper.finish()
	}
	return Remove(ctx, l.Name)
}

// Logs writes the last lines of every program's log, and what became of it.
func (l *Lab) Logs(w io.Writer, lines int) {
	for _, p := range l.programs() {
		fmt.Fprintf(w, "---- %s (%s)\n", p.Name, p.Fate())
		b, err := os.ReadFile(p.Log)
		if err != nil {
			fmt.Fprintln(w, err)
			continue
		}
		all := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
		for _, line := range all[max(0, len(all)-lines):] {
			fmt.Fprintln(w, line)
		}
	}
}

// programs are the processes that ever ran, of each name the last.
func (l *Lab) programs() []*Proc {
	l.mu.Lock()
	defer l.mu.Unlock()
	last := map[string]*Proc{}
	for _, p := range l.procs {
		last[p.Name] = p
	}
	return slices.SortedFunc(maps.Values(last), func(a, b *Proc) int { return strings.Compare(a.Name, b.Name) })
}

// Races returns the reports of the race detector in the logs, for daemons that
// were built with it.
func (l *Lab) Races() string {
	var out strings.Builder
	for _, p := range l.programs() {
		b, _ := os.ReadFile(p.Log)
		if i := bytes.Index(b, []byte("WARNING: DATA RACE")); i >= 0 {
			fmt.Fprintf(&out, "---- %s\n%s\n", p.Name, b[i:min(len(b), i+8000)])
		}
	}
	return out.String()
}

// Node is one namespace on the underlay.
type Node struct {
	*Netns
	IP  netip.Addr // 172.17.0.n; the zero Addr after DropIPv4
	IP6 netip.Addr // fd00:172:17::n
}

// Underlay is the address other hosts know the node by.
func (n *Node) Underlay() netip.Addr {
	if n.IP.IsValid() {
		return n.IP
	}
	return n.IP6
}

// DropIPv4 takes the node's IPv4 address of the underlay away.
func (n *Node) DropIPv4(ctx context.Context) error {
	n.IP = netip.Addr{}
	_, err := n.Run(ctx, "ip", "-4", "address", "flush", "dev", "eth0")
	return err
}

// Node makes a namespace called <lab>-<name> with 172.17.0.n/16 and
// fd00:172:17::n/64 on eth0, on the underlay. It forwards nothing.
func (l *Lab) Node(ctx context.Context, name string, n byte) (*Node, error) {
	ns, err := l.Netns(ctx, name)
	if err != nil {
		return nil, err
	}
	node := &Node{
		Netns: ns,
		IP:    netip.AddrFrom4([4]byte{172, 17, 0, n}),
		IP6:   netip.MustParseAddr(fmt.Sprintf("fd00:172:17::%x", n)),
	}
	if err := l.LAN.Configure(ctx, "link add name "+name+" up master lan type veth peer name eth0 netns "+ns.Name); err != nil {
		return nil, err
	}
	// nodad: the addresses are ours alone, and nobody has to wait for them.
	return node, ns.Configure(ctx,
		"link set eth0 up",
		fmt.Sprintf("address add %s/16 dev eth0", node.IP),
		fmt.Sprintf("address add %s/64 dev eth0 nodad", node.IP6))
}

// keepFile in a lab's directory says that it outlives its process.
const keepFile = "keep"

var labName = regexp.MustCompile(`^(ovl(\d+)(?:\.\d+)?)(?:-.*)?$`)

// Sweep removes the labs of processes that no longer live, except those that
// were to be kept.
func Sweep(ctx context.Context) error {
	labs, err := labs()
	if err != nil {
		return err
	}
	for name, pid := range labs {
		if _, err := os.Stat(filepath.Join(dirOf(name), keepFile)); err == nil {
			continue
		}
		if syscall.Kill(pid, 0) == nil {
			continue
		}
		if err := Remove(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// Kept returns the names of the labs that were made with Options.Keep.
func Kept() ([]string, error) {
	labs, err := labs()
	var kept []string
	for name := range labs {
		if _, err := os.Stat(filepath.Join(dirOf(name), keepFile)); err == nil {
			kept = append(kept, name)
		}
	}
	return kept, err
}

// labs returns name and process of every lab that left a namespace or a
// directory.
func labs() (map[string]int, error) {
	out := map[string]int{}
	for _, dir := range []string{netnsDir, os.TempDir()} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		for _, e := range entries {
			if m := labName.FindStringSubmatch(e.Name()); m != nil {
				out[m[1]], _ = strconv.Atoi(m[2])
			}
		}
	}
	return out, nil
}

// Remove takes a lab down: its processes, by id, its namespaces, its directory.
func Remove(ctx context.Context, name string) error {
	out, err := exec.CommandContext(ctx, "sh", "-c", removeScript, "sh", name, dirOf(name)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("remove lab %s: %w: %s", name, err, out)
	}
	return nil
}

// reaper is a process that removes the lab when its stdin ends: on finish, and
// when this process dies by whatever cause.
type reaper struct {
	cmd   *exec.Cmd
	stdin io.Closer
	out   *bytes.Buffer
}

func startReaper(name string) (*reaper, error) {
	cmd := exec.Command("sh", "-c", "cat >/dev/null\n"+removeScript, "sh", name, dirOf(name))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a Ctrl-C is not for it
	r := &reaper{cmd: cmd, out: new(bytes.Buffer)}
	cmd.Stdout, cmd.Stderr = r.out, r.out
	var err error
	if r.stdin, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the lab's reaper: %w", err)
	}
	return r, nil
}

func (r *reaper) finish() error {
	r.stdin.Close()
	if err := r.cmd.Wait(); err != nil {
		return fmt.Errorf("remove lab: %w: %s", err, r.out)
	}
	return nil
}

// Wait calls f until it returns nil. When timeout has passed or ctx is done, it
// returns f's last error.
func Wait(ctx context.Context, what string, timeout time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w (%w)", what, err, context.Cause(ctx))
		case <-tick.C:
		}
	}
}
