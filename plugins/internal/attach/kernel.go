package attach

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/netns"
	"overlayd.internal/overlay/internal/rtnl"
)

// settleTimeout bounds the wait for the kernel to let packets through. It takes
// a fraction of a millisecond unless the kernel is old or very busy; then most of
// the time that ADD has is spent on it rather than a container refused.
const settleTimeout = 7 * time.Second

// The pauses between two questions to the kernel. They grow, because on a busy
// host those who ask keep the kernel from what they wait for.
const (
	firstPause   = 20 * time.Microsecond
	longestPause = 5 * time.Millisecond
)

// errExists: the interface is there already.
var errExists = errors.New("exists already")

// sandbox holds what is open on the container's network namespace and on ours.
type sandbox struct {
	host   *rtnl.Conn // in our namespace
	inside *rtnl.Conn // in the container's
	netns  netns.NS
}

func openSandbox(path string) (*sandbox, error) {
	host, err := rtnl.Open()
	if err != nil {
		return nil, err
	}
	netns, err := netns.Open(path)
	if err != nil {
		host.Close()
		return nil, err
	}
	inside, err := rtnl.OpenIn(netns)
	if err != nil {
		host.Close()
		netns.Close()
		return nil, err
	}
	return &sandbox{host, inside, netns}, nil
}

func (s *sandbox) close() {
	s.host.Close()
	s.inside.Close()
	s.netns.Close()
}

// vacant makes sure that neither end of the pair is there. What a killed ADD left
// behind is removed: a host end that it has not marked, with the other end, and one whose
// container is gone; one that serves a container is not.
func (s *sandbox) vacant(host, ifName string) error {
	var l rtnl.Link
	there, err := s.host.Has(host)
	ours := false
	if err == nil && there {
		l, ours, err = s.host.LinkByName(host)
		there, ours = l.Index != 0, ours && isHostEnd(l, host)
	}
	if err != nil {
		return err
	}
	if there && ours && l.Alias == "" && !l.Carrier() {
		if err := deleteLink(s.host, host, l.Index, false); err != nil {
			return err
		}
		there = false
	}
	if taken, err := s.inside.Has(ifName); err != nil {
		return err
	} else if taken {
		return fmt.Errorf("interface %s %w in the container", ifName, errExists)
	}
	switch {
	case !there:
		return nil
	case !ours:
		return fmt.Errorf("interface %s %w on the host and is not ours; remove or rename it", host, errExists)
	// The last thing an ADD does is to bring the container's end up, and a
	// namespace that is being torn down has lost its name.
	case l.Carrier() && l.PeerNamed:
		return fmt.Errorf("interface %s %w: the container has it in another network namespace", ifName, errExists)
	}
	return deleteLink(s.host, host, l.Index, false)
}

// removed turns "was not there" into success.
func removed(err error) error {
	if isErrno(err, unix.ENODEV) {
		return nil
	}
	return err
}

// first returns the first error of a batch: the others follow from it.
func first(errs []error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func isErrno(err error, errno unix.Errno) bool { return errors.Is(err, errno) }

// connect makes the pair and sets up the container's end. It returns the routes
// that the container has got from it. What it made is on the undo stack, also
// when it fails.
func (s *sandbox) connect(ctx context.Context, p pair, addrs []netip.Prefix, want []wantedRoute, undo *undoStack) ([]route, error) {
	if err := s.create(p, undo); err != nil {
		return nil, err
	}
	// An address without an interface is released after a minute, by the agent's sweeper
	// and by GC. So whoever was stopped since he has it may have lost it to another. Now
	// there is an interface.
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("set up interface %s: the program was stopped or waited for too long, and its addresses may be another's: %w", p.name, err)
	}
	peer, ok, err := s.inside.Find(p.name)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("interface %s has gone from the container while it was set up", p.name)
	}
	if err := s.prepareIPv6(p.name, slices.ContainsFunc(addrs, isIPv6)); err != nil {
		return nil, err
	}
	routes, err := s.configure(p, peer.Index, addrs, want)
	if err != nil {
		return nil, err
	}
	crash("configured")
	if err := s.settle(ctx, p, addrs); err != nil {
		return nil, err
	}
	return routes, nil
}

// create makes the pair and says whose it is. The host end is found by name once
// it is known to be new, and from then on by index.
func (s *sandbox) create(p pair, undo *undoStack) error {
	var b rtnl.Batch
	p.create(&b)
	err := s.host.Each(&b)[0]
	// Without an answer from the kernel the pair may be there. No other link of
	// that name was before, and the undo leaves what is not ours.
	if !errors.As(err, new(*rtnl.Error)) {
		undo.push(func() error {
			_, answered, err := removeHost(s.host, p.host, turn{})
			if err != nil {
				return err
			}
			return answered()
		})
	}
	crash("made")
	if err == nil {
		err = s.markHost(p)
	}
	crash("linked")
	if isErrno(err, unix.EEXIST) {
		return fmt.Errorf("interface %s: %w: %w", p.name, errExists, err)
	}
	return err
}

func (s *sandbox) markHost(p pair) error {
	host, ok, err := s.host.Find(p.host)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("interface %s has gone from the host while it was set up", p.host)
	}
	for _, ipv6 := range [...]bool{true, false} {
		var b rtnl.Batch
		if p.filtered {
			p.qdisc(&b, host.Index) // refused by a kernel without it, which has no fast path, and the second time
		}
		p.mark(&b, host.Index, ipv6)
		errs := s.host.Each(&b)
		err = errs[len(errs)-1]
		// A link has no IPv6 where its MTU is below 1280, or the kernel was started
		// with ipv6.disable=1. The kernel finds that first, and has done nothing.
		if !isErrno(err, unix.EAFNOSUPPORT) {
			break
		}
	}
	return err
}

func isIPv6(p netip.Prefix) bool { return p.Addr().Is6() }

// prepareIPv6 sets up IPv6 on the container's end before that is up. With it, the
// interface gets its addresses from us and asks no router for others, and has IPv6
// where the runtime has switched it off for the whole namespace. Without it, there
// is none on the link, as Docker does: otherwise every new container announces a
// link-local address to all others on the bridge and asks them for a router, and a
// thousand take that in. For the same reason a container with IPv6 reports each of
// its multicast groups once and does not repeat it: on a bridge no report is lost.
func (s *sandbox) prepareIPv6(ifName string, wanted bool) error {
	const dir = "/proc/sys/net/ipv6/conf/"
	set := func(key, value string) error { return writeSysctl(dir+ifName+"/"+key, value) }
	err := s.netns.Inside(func() error {
		if !wanted {
			// Where that is not ours to write, the link only makes more noise.
			if err := set("disable_ipv6", "1"); !errors.Is(err, fs.ErrPermission) && !isErrno(err, unix.EROFS) {
				return err
			}
			return nil
		}
		// Without the file the kernel has no IPv6, which adding the address says.
		if b, _ := conf.ReadFile(dir + "default/disable_ipv6"); bytes.HasPrefix(b, []byte("1")) {
			if err := set("disable_ipv6", "0"); err != nil {
				return err
			}
		}
		for _, quiet := range [...]struct{ key, value string }{{"accept_ra", "0"}, {"mldv2_unsolicited_report_interval", "3600000"}} {
			if err := set(quiet.key, quiet.value); err != nil && !errors.Is(err, fs.ErrPermission) && !isErrno(err, unix.EROFS) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("set up IPv6 on interface %s: %w", ifName, err)
	}
	return nil
}

// writeSysctl writes a value. A file that is not there belongs to a link without
// IPv6.
func writeSysctl(path, value string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	for {
		_, err := unix.Write(fd, []byte(value))
		switch err {
		case nil:
			return nil
		case unix.EINTR:
		default:
			return &fs.PathError{Op: "write", Path: path, Err: err}
		}
	}
}

// wantedRoute is a route and what to do where the container has one to the
// same destination, from another interface.
type wantedRoute struct {
	route
	// instead is used then; without it the failure is final.
	instead *wantedRoute
	// optional: nothing is lost without it.
	optional bool
}

// configure gives the container's end its addresses, brings it up and adds the
// routes, all in one send.
func (s *sandbox) configure(p pair, index int, addrs []netip.Prefix, want []wantedRoute) ([]route, error) {
	var b rtnl.Batch
	if slices.ContainsFunc(addrs, isIPv6) {
		// The kernel would make a link-local address itself, and then spend a second
		// or two on making sure that nobody else has it.
		addAddress(&b, index, netip.PrefixFrom(mark.LinkLocal(p.mac), 64))
	}
	for _, a := range addrs {
		addAddress(&b, index, a)
	}
	b.LinkUp("set interface "+p.name+" up", index)
	fixed := b.Len()
	for _, r := range want {
		addRoute(&b, index, r.route)
	}
	errs := s.inside.Each(&b)
	if err := first(errs[:fixed]); err != nil {
		return nil, err
	}
	var got []route
	for i, r := range want {
		ok, err := s.settleRoute(index, &r, errs[fixed+i])
		if err != nil {
			return nil, err
		}
		if ok {
			got = append(got, r.route)
		}
	}
	return got, nil
}

// settleRoute deals with the kernel's answer to one route: r is the one that is
// in the kernel in the end, if ok.
func (s *sandbox) settleRoute(index int, r *wantedRoute, err error) (ok bool, _ error) {
	for isErrno(err, unix.EEXIST) {
		if r.instead == nil {
			if r.optional {
				return false, nil
			}
			return false, err
		}
		*r = *r.instead
		var b rtnl.Batch
		addRoute(&b, index, r.route)
		err = s.inside.Each(&b)[0]
	}
	return err == nil, err
}

// settle waits until packets flow, so that the very first one of the container
// arrives. Three things the kernel does in work queues, which on a busy host take
// their time: it lets a device send, and a bridge forward for a port, when it has
// noticed the carrier (reading the link makes it notice, since Linux 6.8); the
// bridge itself gets a carrier with its first port; and it receives for an IPv6
// address when it is through with duplicate detection, also where that is left
// out.
func (s *sandbox) settle(ctx context.Context, p pair, addrs []netip.Prefix) error {
	until := time.Now().Add(settleTimeout)
	for _, end := range [...]struct {
		conn *rtnl.Conn
		name string
	}{{s.inside, p.name}, {s.host, p.host}, {s.host, p.bridge}} {
		if err := wait(ctx, until, "interface "+end.name+" to become operational", func() (bool, error) {
			l, ok, err := end.conn.LinkByName(end.name)
			if err == nil && !ok {
				err = fmt.Errorf("interface %s has gone while %s was set up", end.name, p.name)
			}
			return l.Operational, err
		}); err != nil {
			return err
		}
	}
	for _, a := range addrs {
		if !a.Addr().Is6() {
			continue
		}
		if err := wait(ctx, until, "address "+a.Addr().String()+" to be received", func() (bool, error) {
			return s.inside.IsLocal(a.Addr())
		}); err != nil {
			return err
		}
	}
	return nil
}

// wait asks until done says so, the first time at once. That is nearly always
// enough, so nothing is set up for waiting before.
func wait(ctx context.Context, until time.Time, what string, done func() (bool, error)) error {
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		if time.Now().After(until) {
			return fmt.Errorf("wait for %s: %w", what, context.DeadlineExceeded)
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("wait for %s: %w", what, err)
		}
		// The thread itself sleeps: a timer of Go would start the poller and
		// threads for it, which takes longer than the kernel.
		_ = unix.Nanosleep(&unix.Timespec{Nsec: int64(pause)}, nil)
	}
}
