// Package explain walks the way of a packet from a container of this host to
// another address, says at which step it stops and why, and sends probes along
// the way with the overlay's own encapsulation. What may be wrong at a step is
// what doctor finds; there is no second set of checks.
package explain

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/audit/doctor"
)

// Result is what became of the walk, and Step one part of it.
type (
	Result = api.Explanation
	Step   = api.Step
)

// Elsewhere is the error of a walk whose packet is not sent by this host, but by the
// one that has the container.
type Elsewhere struct {
	Host netip.Addr // agent IP
	A, B string
}

func (e *Elsewhere) Error() string {
	return fmt.Sprintf("%s runs on host %s; run this there: overlayctl explain %s %s", e.A, e.Host, e.A, e.B)
}

// end is one end of the way.
type end struct {
	name    string
	addr    netip.Addr
	record  *ipam.Record       // of a container of this host
	overlay *conf.AgentOverlay // whose range holds addr, as this host has it
	peer    *conf.Peer         // whose subnet holds addr
}

// walk is one explanation.
type walk struct {
	ctx      context.Context
	conn     *rtnl.Conn
	books    audit.Host
	peers    []conf.Peer
	findings []doctor.Finding
	a, b     end
	result   Result
}

// ErrUnknown: a name is no container of this host and no address. ErrNoAgent: this host
// is none of the overlay, so that nothing can be told of it.
var (
	ErrUnknown = errors.New("no container of this host and no address")
	ErrNoAgent = errors.New("no agent has published anything on this host")
)

// Walk explains the way from a to b, each the id of a container of this host, the
// beginning of one, or an address.
func Walk(ctx context.Context, o doctor.Options, a, b string) (Result, error) {
	return run(ctx, o, a, b, func(w *walk) error {
		if from := w.sender(); from != nil {
			return &Elsewhere{Host: from.AgentIP, A: a, B: b}
		}
		if w.b.record == nil && w.b.peer != nil {
			w.result.ToHost = w.b.peer.AgentIP
		}
		w.there()
		return nil
	})
}

// there walks from a to b.
func (w *walk) there() { w.steps(w.source, w.isolation, w.forwarding, w.destination) }

// sender is the other host whose address, or whose container's, a is; nil: none.
func (w *walk) sender() *conf.Peer {
	if w.a.record != nil || w.a.peer != nil || w.ownAddress(w.a.addr) {
		return w.a.peer
	}
	for i := range w.peers {
		if p := &w.peers[i]; slices.Contains([]netip.Addr{p.AgentIP, p.SecondIP, p.VTEPIP, p.VTEPIP6}, w.a.addr) {
			return p
		}
	}
	return nil
}

// run reads what is known on this host, and has the way between both ends traced.
func run(ctx context.Context, o doctor.Options, a, b string, trace func(*walk) error) (Result, error) {
	w := &walk{ctx: ctx, result: Result{From: a, To: b}}
	if err := w.read(o); err != nil {
		return w.result, err
	}
	w.result.Host = w.books.State.IP
	var err error
	if w.conn, err = rtnl.Open(); err != nil {
		return w.result, err
	}
	defer w.conn.Close()
	if err := w.resolve(a, b); err != nil {
		return w.result, err
	}
	w.result.FromAddress, w.result.ToAddress = w.a.addr, w.b.addr
	err = trace(w)
	return w.result, err
}

// steps takes steps until one stops.
func (w *walk) steps(all ...func() bool) {
	for _, step := range all {
		if !step() {
			return
		}
	}
	w.result.Reachable = true
}

func (w *walk) read(o doctor.Options) (err error) {
	if w.books, err = audit.Read(w.ctx, o.RunDir); err != nil {
		return err
	}
	if errors.Is(w.books.StateErr, fs.ErrNotExist) {
		return ErrNoAgent
	}
	if w.books.StateErr != nil {
		return fmt.Errorf("what the agent published: %w", w.books.StateErr)
	}
	stateDir := o.StateDir
	if stateDir == "" {
		stateDir = w.books.State.Directories.State
	}
	if w.peers, err = audit.StoredPeers(stateDir); err != nil {
		return err
	}
	w.findings, err = doctor.Look(w.ctx, o)
	return err
}

// resolve finds both ends, in a family that both have.
func (w *walk) resolve(a, b string) error {
	as, err := w.ends(a)
	if err != nil {
		return err
	}
	bs, err := w.ends(b)
	if err != nil {
		return err
	}
	for _, x := range as {
		for _, y := range bs {
			if x.addr.Is4() == y.addr.Is4() {
				w.a, w.b = x, y
				return nil
			}
		}
	}
	return fmt.Errorf("%s and %s have no family of addresses in common", a, b)
}

// ends are the addresses a name stands for.
func (w *walk) ends(name string) (out []end, _ error) {
	if addr, err := netip.ParseAddr(name); err == nil {
		return []end{w.at(name, addr.Unmap())}, nil
	}
	ids := map[string]bool{}
	for r := range named(w.books, name) {
		ids[r.ContainerID] = true
		for _, a := range r.Addrs {
			out = append(out, w.at(name, a))
		}
	}
	switch {
	case len(ids) == 0 && w.unread("") != "":
		return nil, fmt.Errorf("%s: %w, as far as is known: %s", name, ErrUnknown, w.unread(""))
	case len(ids) == 0:
		return nil, fmt.Errorf("%s: %w; overlayctl containers lists those of this host, those of others are named by address", name, ErrUnknown)
	case len(ids) > 1:
		return nil, fmt.Errorf("%s: %d containers of this host begin so: %s", name, len(ids), strings.Join(slices.Sorted(maps.Keys(ids)), ", "))
	}
	return out, nil
}

// named are the attachments of this host's containers with that id, or else with ids
// that begin so.
func named(books audit.Host, name string) iter.Seq[ipam.Record] {
	return func(yield func(ipam.Record) bool) {
		for _, is := range []func(id string) bool{
			func(id string) bool { return id == name },
			func(id string) bool { return name != "" && strings.HasPrefix(id, name) },
		} {
			found := false
			for _, s := range books.Stores {
				for _, r := range s.Records {
					if !is(r.ContainerID) {
						continue
					}
					if found = true; !yield(r) {
						return
					}
				}
			}
			if found {
				return
			}
		}
	}
}

// Named are the ids of this host's containers that a name may stand for.
func Named(ctx context.Context, runDir, name string) ([]string, error) {
	books, err := audit.Read(ctx, runDir)
	if err != nil {
		return nil, err
	}
	ids := map[string]bool{}
	for r := range named(books, name) {
		ids[r.ContainerID] = true
	}
	return slices.Sorted(maps.Keys(ids)), nil
}

// at is what there is to know about an address.
func (w *walk) at(name string, addr netip.Addr) end {
	e := end{name: name, addr: addr}
	for i := range w.books.State.Overlays {
		o := &w.books.State.Overlays[i]
		for _, whole := range []netip.Prefix{o.Info.Subnet, o.Info.Subnet6} {
			if whole.IsValid() && whole.Contains(addr) {
				e.overlay = o
			}
		}
	}
	for _, s := range w.books.Stores {
		for i := range s.Records {
			if slices.Contains(s.Records[i].Addrs, addr) {
				e.record = &s.Records[i]
			}
		}
	}
	for i := range w.peers {
		if slices.ContainsFunc(w.peers[i].Subnets, func(p netip.Prefix) bool { return p.Contains(addr) }) {
			e.peer = &w.peers[i]
		}
	}
	if e.overlay != nil && e.record == nil && e.peer == nil {
		e.peer = w.peerFromKernel(addr)
	}
	return e
}

// unread says which address stores of this host cannot be read, of all overlays or of
// one: no container is known of these. It is empty where all can.
func (w *walk) unread(overlay string) string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(w.books.Stores)) {
		if s := w.books.Stores[name]; (overlay == "" || overlay == name) && (s.Err != nil || len(s.Problems) > 0) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return fmt.Sprintf("the address store of overlay %s cannot be read; see overlayctl ipam check", strings.Join(names, ", "))
}

// nobody stops where no container of this host is known to have an address: because of
// what is said, or because nobody can tell.
func (w *walk) nobody(step string, e end, format string, args ...any) bool {
	if e.overlay != nil {
		if why := w.unread(e.overlay.Info.Name); why != "" {
			return w.stop(step, "whether a container of this host has %s is not known: %s", e.addr, why)
		}
	}
	return w.stop(step, format, args...)
}

// pass notes a step that is in order.
func (w *walk) pass(name, format string, args ...any) bool {
	w.result.Steps = append(w.result.Steps, Step{Name: name, OK: true, Text: fmt.Sprintf(format, args...)})
	return true
}

// stop notes the step at which the way ends.
func (w *walk) stop(name, format string, args ...any) bool {
	text := fmt.Sprintf(format, args...)
	w.result.Steps = append(w.result.Steps, Step{Name: name, Text: text})
	w.result.StopsAt = name + ": " + text
	return false
}

// sound stops at the first error that some checks found about one of the objects
// or about the whole host.
func (w *walk) sound(name string, checks []string, objects ...string) bool {
	for _, f := range w.findings {
		if slices.Contains(checks, f.Check) && (f.Object == "" || slices.Contains(objects, f.Object)) && f.Severity == doctor.Error {
			return w.stop(name, "%s (%s); %s", f.What, f.Evidence, f.Fix)
		}
	}
	return true
}
