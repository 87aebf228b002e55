package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/pki"
	"overlayd.internal/overlay/overlayd/internal/serve"
	"overlayd.internal/overlay/overlayd/internal/store"
)

// warnPause is the time between two warnings of a program that runs without
// identities.
const warnPause = time.Minute

// warnInsecure says what --insecure means, now and every minute until ctx ends.
func warnInsecure(ctx context.Context, log *slog.Logger) {
	warn := func() {
		log.Warn("INSECURE: plain HTTP and no identity; every host that reaches the coordinator can join the cluster and read its traffic; for a laboratory only")
	}
	warn()
	go func() {
		tick := time.NewTicker(warnPause)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				warn()
			}
		}
	}()
}

// openIdentity opens the coordinator's side of identity, nil with --insecure.
func (f *coordinatorFlags) openIdentity(ctx context.Context, st store.Store, log *slog.Logger) (*pki.Registry, error) {
	if f.insecure {
		return nil, nil
	}
	return pki.Open(ctx, pki.Options{
		Store: st, Dir: filepath.Join(f.stateDir, pki.Dir), OperatorDir: f.pkiDir, JoinToken: f.joinToken,
		Names: slices.Concat(f.advertise, pki.LocalNames(f.listen)), Log: log,
	})
}

// checkIdentity reports flags that contradict each other.
func (f *coordinatorFlags) checkIdentity() error {
	switch {
	case f.stateDir == "":
		return cli.Usagef("--state-dir is empty; name the directory that keys and leases are to be kept in")
	case f.insecure && f.joinToken != "":
		return cli.Usagef("--join-token and --insecure: without identities there is nothing to join with a token; leave one of them out")
	case f.insecure && f.pkiDir != "":
		return cli.Usagef("--pki-dir and --insecure: without identities no CA is needed; leave one of them out")
	}
	for _, name := range f.advertise {
		if _, err := netip.ParseAddr(name); err != nil && !validHost(name) {
			return cli.Usagef("--advertise %q: want addresses and names by which agents reach this coordinator, without port, as in 10.0.0.1,overlay.example.com", name)
		}
	}
	return nil
}

// peerClient is how the other coordinators are asked, nil with --insecure.
func peerClient(identity *pki.Registry) *http.Client {
	if identity == nil {
		return nil
	}
	return identity.Client()
}

// maxURLs is how many addresses a coordinator names to the others.
const maxURLs = 8

// urls are where the other coordinators reach this one: the names that were given,
// or the address that is listened on, or all addresses of the host that are none of
// the overlays'.
func (f *coordinatorFlags) urls(listening net.Addr, network conf.Network) (out []string) {
	hosts := slices.Concat(f.advertise, pki.LocalNames(f.listen))
	if len(hosts) == 0 {
		hosts = hostAddresses(network)
	}
	_, port, err := net.SplitHostPort(listening.String())
	if err != nil {
		return nil
	}
	scheme := "https://"
	if f.insecure {
		scheme = "http://"
	}
	for _, host := range hosts[:min(len(hosts), maxURLs)] {
		out = append(out, scheme+net.JoinHostPort(host, port))
	}
	return out
}

func hostAddresses(network conf.Network) (out []string) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || !p.Addr().IsGlobalUnicast() || network.VTEPSubnet.Contains(p.Addr()) || network.VTEPSubnet6.Contains(p.Addr()) {
			continue
		}
		ours := slices.ContainsFunc(network.Overlays, func(o conf.Overlay) bool { return o.Subnet.Contains(p.Addr()) || o.Subnet6.Contains(p.Addr()) })
		if !ours {
			out = append(out, p.Addr().String())
		}
	}
	return out
}

// ownNetworks are those that the interfaces of this host are in.
func ownNetworks() (out []netip.Prefix) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().IsGlobalUnicast() {
			out = append(out, p.Masked())
		}
	}
	return out
}

// setToken checks a token. The error does not repeat it: it is a secret.
func setToken(to *string) func(string) error {
	return func(s string) error {
		*to = strings.TrimSpace(s)
		if *to == "" {
			return nil
		}
		_, err := pki.ParseToken(*to)
		return err
	}
}

// validHost reports whether a name could be that of a host.
func validHost(name string) bool {
	return name != "" && len(name) < 254 && !strings.ContainsAny(name, ":/ @,") && !strings.HasPrefix(name, "-")
}

// listenLocal makes the socket in the state directory. Its path may be too long
// for one; then there is none, and overlayctl needs a certificate.
func listenLocal(ctx context.Context, stateDir string, log *slog.Logger) (*serve.SocketListener, error) {
	abs, err := filepath.Abs(stateDir)
	if err != nil {
		return nil, err
	}
	socket := serve.Socket{Path: filepath.Join(abs, coordinator.SocketFile), Perm: 0o600, Look: 2 * time.Second}
	if len(socket.Path) > serve.MaxSocketPath {
		log.Warn("the path of the socket for overlayctl is too long; choose a shorter --state-dir to have one", "path", socket.Path, "max_bytes", serve.MaxSocketPath)
		return nil, nil
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return nil, err
	}
	return socket.Listen(ctx)
}

// connect makes the client of an agent: one that has joined, or plain HTTP with
// --insecure.
func (f *agentFlags) connect(log *slog.Logger) (*api.Client, error) {
	if err := f.checkIdentity(); err != nil {
		return nil, err
	}
	if f.insecure {
		client, err := api.NewClient(f.CoordinatorURLs, nil)
		return client, cli.Usage(err)
	}
	m, err := pki.OpenMember(pki.MemberOptions{
		Dir: filepath.Join(f.StateDir, pki.Dir), Token: f.token, Log: log,
		CAChanged: func(ca []byte) { publishCA(f.RunDir, ca, log) },
	})
	if err != nil {
		return nil, err
	}
	if _, joined := m.Joined(); !joined && f.joinToken == "" && f.joinTokenFile == "" {
		return nil, cli.Usagef("this host has not joined the cluster: there is no certificate in %s; give it a token with --join-token or --join-token-file "+
			"(on a coordinator's host, overlayctl token create prints one)", filepath.Join(f.StateDir, pki.Dir))
	}
	f.Identify, f.KeepIdentity = m.SetName, m.Rewrite
	client, err := api.NewClient(f.CoordinatorURLs, m.Client())
	return client, cli.Usage(err)
}

// token is the join token, or "" where there is none.
func (f *agentFlags) token() (string, error) {
	if f.joinTokenFile == "" {
		return f.joinToken, nil
	}
	b, err := os.ReadFile(f.joinTokenFile)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("--join-token-file %s is not there yet", f.joinTokenFile)
	}
	return strings.TrimSpace(string(b)), err
}

// checkIdentity reports flags that contradict each other.
func (f *agentFlags) checkIdentity() error {
	for _, u := range f.CoordinatorURLs {
		secure := strings.HasPrefix(strings.ToLower(u), "https://")
		switch {
		case f.insecure && secure:
			return cli.Usagef("--insecure and %s: an agent without identity does not talk to a coordinator that asks for one; leave --insecure out and give --join-token", u)
		case !f.insecure && strings.HasPrefix(strings.ToLower(u), "http://"):
			return cli.Usagef("--coordinator %s: the coordinator behind it has no identity, so anybody could stand in for it; write https://, or, in a laboratory, start coordinator and agents with --insecure", u)
		}
	}
	switch {
	case f.insecure && (f.joinToken != "" || f.joinTokenFile != ""):
		return cli.Usagef("a join token and --insecure: without identities there is nothing to join with a token; leave one of them out")
	case f.joinToken != "" && f.joinTokenFile != "":
		return cli.Usagef("--join-token and --join-token-file: give one of them")
	case f.StateDir == "":
		return cli.Usagef("--state-dir is empty; name the directory that the keys are to be kept in")
	}
	if host, _, err := net.SplitHostPort(f.Listen); err == nil && !f.insecure {
		if ip, err := netip.ParseAddr(host); host != "localhost" && (err != nil || !ip.IsLoopback()) {
			return cli.Usagef("--listen %s: what the agent serves there it serves to anybody, so it stays on this host; want a loopback address, as in 127.0.0.1:6441", f.Listen)
		}
	}
	return nil
}

// publishCA lets programs on this host that are not root know which coordinators
// to trust.
func publishCA(runDir string, ca []byte, log *slog.Logger) {
	err := os.MkdirAll(runDir, 0o755)
	if err == nil {
		err = conf.WriteFile(filepath.Join(runDir, conf.CAFile), ca, 0o644, "")
	}
	if err != nil {
		log.Warn("cannot publish the cluster's CA; overlayctl status needs root to verify the coordinator", "err", err)
	}
}

// socketGroup is the group that may talk to the agent, beside root: the one named
// overlay, where the host has one.
func socketGroup() int {
	g, err := user.LookupGroup("overlay")
	if err != nil {
		return 0
	}
	id, err := strconv.Atoi(g.Gid)
	if err != nil {
		return 0
	}
	return id
}
