package lab

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
)

const netnsDir = "/run/netns"

// Netns is one named network namespace.
type Netns struct {
	Name string
	Path string
}

// Netns makes a network namespace called <lab>-<name>, with its loopback up.
func (l *Lab) Netns(ctx context.Context, name string) (*Netns, error) {
	n := &Netns{Name: l.Name + "-" + name}
	n.Path = filepath.Join(netnsDir, n.Name)
	if err := run(exec.CommandContext(ctx, "ip", "netns", "add", n.Name)); err != nil {
		return nil, err
	}
	return n, n.Configure(ctx, "link set lo up")
}

// Delete removes the namespace with everything in it.
func (n *Netns) Delete(ctx context.Context) error {
	return run(exec.CommandContext(ctx, "ip", "netns", "delete", n.Name))
}

// Command is a program that will run inside the namespace, with the process id
// that the Cmd reports.
func (n *Netns) Command(ctx context.Context, argv ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + n.Path, "--"}, argv...)...)
}

// Run runs a program inside the namespace and returns what it printed, without
// standard error: ip(8) complains there of namespaces that go while it looks for
// the name of a peer's. The error holds command line and both.
func (n *Netns) Run(ctx context.Context, argv ...string) (string, error) {
	cmd := n.Command(ctx, argv...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s: %s: %w: %s%s", n.Name, strings.Join(argv, " "), err, out, &stderr)
	}
	return string(out), nil
}

// Configure runs commands of ip(8), one a line, as one batch.
func (n *Netns) Configure(ctx context.Context, lines ...string) error {
	cmd := exec.CommandContext(ctx, "ip", "-n", n.Name, "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(lines, "\n") + "\n")
	return run(cmd)
}

// Sysctl sets a sysctl of the namespace.
func (n *Netns) Sysctl(ctx context.Context, key, value string) error {
	_, err := n.Run(ctx, "sysctl", "-q", "-w", key+"="+value)
	return err
}

func run(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}

// Dial opens a TCP connection from inside the namespace. A socket belongs to the
// namespace it was made in, wherever it is used.
func (n *Netns) Dial(ctx context.Context, to netip.AddrPort) (c net.Conn, err error) {
	nsErr := ns.WithNetNSPath(n.Path, func(ns.NetNS) error {
		c, err = new(net.Dialer).DialContext(ctx, "tcp", to.String())
		return nil
	})
	if nsErr != nil {
		return nil, fmt.Errorf("enter %s: %w", n.Name, nsErr)
	}
	return c, err
}

// Listen opens a TCP port on every address the namespace has and will get.
func (n *Netns) Listen(ctx context.Context, port uint16) (l net.Listener, err error) {
	nsErr := ns.WithNetNSPath(n.Path, func(ns.NetNS) error {
		l, err = new(net.ListenConfig).Listen(ctx, "tcp", fmt.Sprintf("[::]:%d", port))
		return nil
	})
	if nsErr != nil {
		return nil, fmt.Errorf("enter %s: %w", n.Name, nsErr)
	}
	return l, err
}

// HTTP is a client whose connections start inside the namespace. Hosts in URLs
// must be addresses.
func (n *Netns) HTTP() *http.Client {
	return &http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
				to, err := netip.ParseAddrPort(addr)
				if err != nil {
					return nil, err
				}
				return n.Dial(ctx, to)
			},
		},
	}
}
