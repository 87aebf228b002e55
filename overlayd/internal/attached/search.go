package attached

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
)

// Ref is an agent as a search needs it.
type Ref struct {
	ID string
	IP netip.Addr
}

// Query is what is looked for; empty: everything.
type Query struct {
	Overlay string
	Text    string // beginning of an id or address, part of a name, an overlay
	After   string // of the page before
	Limit   int    // of what is returned, not of what is counted
}

// Search goes through the agents in the given order.
func (b *Book) Search(agents []Ref, q Query) (out api.Containers, err error) {
	out.Containers = []api.Container{}
	from, err := parseCursor(q.After)
	if err != nil {
		return out, err
	}
	match := newMatcher(q.Text)
	began := q.After == ""
	b.mu.RLock()
	found := make([]*agent, len(agents))
	for i, ref := range agents {
		found[i] = b.agents[ref.ID]
	}
	b.mu.RUnlock()
	var last cursor
	for i, ref := range agents {
		a := found[i]
		if a == nil {
			continue
		}
		wanted := a.matches(q.Overlay, match.overlay)
		here := !began && ref == from.Ref
		began = began || !here && from.before(ref)
		for b := a.records; len(b) > 0; {
			var r record
			r, b = next(b)
			w := wanted[r.kind]
			if !w.in || !w.named && !match.record(r) {
				continue
			}
			out.Total++
			k := a.kinds[r.kind].Value()
			if !began && !(here && from.order.compare(r.order(k)) < 0) {
				continue
			}
			if len(out.Containers) == q.Limit {
				if out.Next == "" {
					out.Next = last.String()
				}
				continue
			}
			x := r.attachment(k)
			last = cursor{ref, orderOf(x)}
			out.Containers = append(out.Containers, api.Container{
				ID: x.ID, Runtime: x.Runtime, Name: x.Name, Network: x.Network, IfName: x.IfName, Overlay: x.Overlay, Half: x.Half,
				Addresses: x.Addresses, AgentID: ref.ID, AgentIP: ref.IP, Since: time.Unix(x.Since, 0).UTC(),
			})
		}
		began = began || here
	}
	return out, nil
}

// wanted says of a kind whether it is asked for, and whether its name is.
type wanted struct{ in, named bool }

func (a *agent) matches(overlay string, named func(string) bool) []wanted {
	out := make([]wanted, len(a.kinds))
	for i, h := range a.kinds {
		k := h.Value()
		out[i] = wanted{in: overlay == "" || k.overlay == overlay, named: named(k.overlay)}
	}
	return out
}

// matcher compares records with a text, in lower case, without unpacking them.
type matcher struct {
	text    string
	bytes   []byte // text
	nibbles []byte // of an id that is packed; nil: it cannot be the beginning of one
	addr    bool   // it may be the beginning of an address
}

func newMatcher(text string) matcher {
	m := matcher{text: strings.ToLower(text)}
	m.bytes = []byte(m.text)
	if strings.Trim(m.text, "0123456789abcdef") == "" {
		for _, c := range []byte(m.text) {
			m.nibbles = append(m.nibbles, byte(strings.IndexByte("0123456789abcdef", c)))
		}
	}
	m.addr = strings.ContainsAny(m.text, "0123456789abcdef:") && strings.Trim(m.text, "0123456789abcdef:.") == ""
	return m
}

func (m matcher) overlay(name string) bool {
	return m.text == "" || strings.HasPrefix(strings.ToLower(name), m.text)
}

func (m matcher) record(r record) bool {
	if r.hex && len(m.nibbles) > 0 && m.id(r.id) || !r.hex && startsWith(r.id, m.text) {
		return true
	}
	if m.name(r.name) {
		return true
	}
	if !m.addr {
		return false
	}
	var text [64]byte
	for i := range r.count() {
		if startsWith(r.addr(i).AppendTo(text[:0]), m.text) {
			return true
		}
	}
	return false
}

func (m matcher) name(name []byte) bool {
	if len(name) < len(m.bytes) {
		return false
	}
	upper := slices.ContainsFunc(name, func(c byte) bool { return 'A' <= c && c <= 'Z' || c > 0x7f })
	return bytes.Contains(name, m.bytes) || upper && bytes.Contains(bytes.ToLower(name), m.bytes)
}

func (m matcher) id(packed []byte) bool {
	if len(m.nibbles) > 2*len(packed) {
		return false
	}
	for i, n := range m.nibbles {
		have := packed[i/2] >> 4
		if i%2 == 1 {
			have = packed[i/2] & 0xf
		}
		if have != n {
			return false
		}
	}
	return true
}

func startsWith(b []byte, prefix string) bool {
	return len(b) >= len(prefix) && strings.EqualFold(string(b[:len(prefix)]), prefix)
}

// cursor is the last record of a page. It holds its place when that is gone.
type cursor struct {
	Ref
	order
}

// before reports whether the cursor's agent comes before another one.
func (c cursor) before(r Ref) bool { return Less(c.Ref, r) < 0 }

// Less is the order of agents in a search.
func Less(a, b Ref) int {
	if c := a.IP.Compare(b.IP); c != 0 {
		return c
	}
	return strings.Compare(a.ID, b.ID)
}

func (c cursor) String() string {
	addr := ""
	if c.addr.IsValid() {
		addr = c.addr.String()
	}
	return base64.RawURLEncoding.EncodeToString([]byte(strings.Join([]string{c.IP.String(), c.ID, addr, c.key}, "\n")))
}

func parseCursor(s string) (c cursor, err error) {
	if s == "" {
		return c, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(s)
	parts := strings.Split(string(b), "\n")
	if err == nil && len(parts) == 4 {
		c.ID, c.key = parts[1], parts[3]
		c.IP, err = netip.ParseAddr(parts[0])
		if err == nil && parts[2] != "" {
			c.addr, err = netip.ParseAddr(parts[2])
		}
	}
	if err != nil || len(parts) != 4 {
		return c, fmt.Errorf("after %.80q is not what a page before named as next", s)
	}
	return c, nil
}

// attachments are those of one agent, in order. a may be nil.
func (a *agent) attachments() iter.Seq[api.Attachment] {
	return func(yield func(api.Attachment) bool) {
		if a == nil {
			return
		}
		for b := a.records; len(b) > 0; {
			var r record
			r, b = next(b)
			if !yield(r.attachment(a.kinds[r.kind].Value())) {
				return
			}
		}
	}
}

// usages are how full the halves of one agent are. a may be nil.
func (a *agent) usages() iter.Seq[api.HalfUsage] {
	return func(yield func(api.HalfUsage) bool) {
		if a == nil {
			return
		}
		for b := a.usage; len(b) > 0; {
			var u api.HalfUsage
			u, b = nextUsage(b, a.kinds)
			if !yield(u) {
				return
			}
		}
	}
}

// Usage is how full the halves of an agent are, and its problems.
func (b *Book) Usage(id string) (usage []api.HalfUsage, problems []string) {
	a := b.get(id)
	if a == nil {
		return nil, nil
	}
	for u := range a.usages() {
		usage = append(usage, u)
	}
	return usage, a.problems
}

// Host is what an agent says of its host, and what is wrong there; nil where it
// has not said.
func (b *Book) Host(id string) (host *api.Host, problems []string) {
	a := b.get(id)
	if a == nil {
		return nil, nil
	}
	return a.host, a.problems
}

// Total is how many attachments an overlay has. It takes the same time however many
// there are.
func (b *Book) Total(overlay string) int {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.totals[overlay]
}

// AttachedTo counts the attachments of an overlay, by agent id.
func (b *Book) AttachedTo(overlay string) map[string]int {
	b.mu.RLock()
	defer b.mu.RUnlock()
	byAgent := map[string]int{}
	for id, a := range b.agents {
		in := a.matches(overlay, func(string) bool { return false })
		n := 0
		for b := a.records; len(b) > 0; {
			var r record
			if r, b = next(b); in[r.kind].in {
				n++
			}
		}
		if n > 0 {
			byAgent[id] = n
		}
	}
	return byAgent
}
