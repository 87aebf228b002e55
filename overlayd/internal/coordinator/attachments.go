package coordinator

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/attached"
	"overlayd.internal/overlay/overlayd/internal/metrics"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// What agents have attached. It is told by them, kept in memory alone, and told
// again after a start of the coordinator.

const (
	// maxReport bounds a report that was unpacked, in bytes.
	maxReport = 16 << 20
	// maxWord bounds a name in a report, maxProblems and maxProblem what an agent
	// says is wrong.
	maxWord = 256
	// maxContainerID is what the CNI programs take.
	maxContainerID = 1024
	maxProblems    = 20
	maxProblem     = 400
	maxHostWord    = 16
	maxRoutes      = 32
	// maxFurther is how many attachments an agent may have beyond those that fit
	// its lease: of overlays that it no longer has.
	maxFurther = 256
	// maxCooling is how many addresses of a half may cool: sums of them have to fit.
	maxCooling = 1 << 32

	defaultPage = 1000
	maxPage     = 10_000
)

// unpacked gives a handler the body as it was before it was packed. Bodies are
// worked on one at a time: what agents have attached can wait for a moment, and
// those that want a lease get the other processors.
func (c *Coordinator) unpacked(h serve.Handler) serve.Handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		encoding := r.Header.Get("Content-Encoding")
		if encoding != "" && encoding != "gzip" {
			return refuse(http.StatusUnsupportedMediaType, "Content-Encoding %.80q: want gzip, or nothing", encoding)
		}
		body, err := serve.ReadBody(w, r)
		if err != nil {
			return err
		}
		select {
		case c.reportTurn <- struct{}{}:
			defer func() { <-c.reportTurn }()
		case <-r.Context().Done():
			return r.Context().Err()
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		if encoding == "" {
			return h(w, r)
		}
		packed, _ := c.unpackers.Get().(*gzip.Reader)
		if packed == nil {
			packed = new(gzip.Reader)
		}
		defer c.unpackers.Put(packed)
		if err := packed.Reset(r.Body); err != nil {
			return refuse(http.StatusBadRequest, "the body cannot be unpacked: %v", err)
		}
		r.Body = http.MaxBytesReader(w, io.NopCloser(packed), maxReport)
		return h(w, r)
	}
}

func (c *Coordinator) serveAttachments(w http.ResponseWriter, _ *http.Request, report *api.AttachmentReport) error {
	if err := c.TakeAttachments(*report); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// TakeAttachments takes in what an agent reports of its containers.
func (c *Coordinator) TakeAttachments(report api.AttachmentReport) error {
	most, err := c.checkAttachments(&report)
	if err != nil {
		return err
	}
	change, err := c.book.Apply(report, most)
	switch {
	case errors.Is(err, attached.ErrSnapshotWanted):
		return refuseKind(api.KindSnapshotWanted, "report %d of agent %s continues one that is not known here; send a snapshot", report.Sequence, report.AgentID)
	case errors.Is(err, attached.ErrTooMany):
		return refuse(http.StatusBadRequest, "agent %s reports more containers than its lease has room for, which is %d", report.AgentID, most)
	case err != nil:
		return fmt.Errorf("report of agent %s: %w", report.AgentID, err)
	}
	c.noteChange(report.AgentID, change)
	return nil
}

// checkAttachments refuses what no agent of ours says, and returns how many
// attachments the agent may have.
func (c *Coordinator) checkAttachments(r *api.AttachmentReport) (most int, err error) {
	if err := checkAgentID(r.AgentID); err != nil {
		return 0, err
	}
	c.mu.Lock()
	a, st := c.view.agents[r.AgentID], c.view.statuses[r.AgentID]
	c.mu.Unlock()
	if a == nil {
		return 0, unknownAgent(r.AgentID)
	}
	if registered := st.decode().Instance; registered != "" && registered != r.Instance {
		return 0, refuseKind(api.KindSnapshotWanted, "agent %s has not registered here since it was started, or another one has its id; register, then send a snapshot", r.AgentID)
	}
	bad := func(what string, value any) error {
		return refuse(http.StatusBadRequest, "report of agent %s: %s %.80q cannot be right", r.AgentID, what, value)
	}
	if r.Instance == "" || len(r.Instance) > maxWord {
		return 0, bad("instance", r.Instance)
	}
	for i := range r.Put {
		p := &r.Put[i]
		if len(p.ID) > maxContainerID {
			return 0, bad("container", p.ID)
		}
		for _, word := range [...]string{p.Network, p.IfName} {
			if len(word) > maxWord {
				return 0, bad("name", word)
			}
		}
		p.Name, p.Runtime = conf.CleanName(p.Name), conf.CleanName(p.Runtime)
		if _, err := conf.ParseHalf(string(p.Half)); err != nil {
			return 0, bad("half", p.Half)
		}
		if conf.CheckName(p.Overlay) != nil {
			return 0, bad("overlay", p.Overlay)
		}
		if len(p.Addresses) > attached.MaxAddresses || slices.ContainsFunc(p.Addresses, func(a netip.Addr) bool { return !a.IsValid() || a.Zone() != "" }) {
			return 0, bad("list of addresses", fmt.Sprint(p.Addresses))
		}
	}
	most = a.room() + maxFurther
	told := map[string]bool{}
	for _, u := range r.Usage {
		_, err := conf.ParseHalf(string(u.Half))
		if u.Half == conf.SharedPool {
			err = nil
		}
		what := string(u.Half) + " of " + u.Overlay
		if _, configured := c.network().Overlay(u.Overlay); err != nil || !configured && !a.has(u.Overlay) || told[what] {
			return 0, bad("usage of", what)
		}
		if max(u.Total, u.Used, u.Free) > uint64(most) || u.Cooling > maxCooling {
			return 0, bad("usage of", fmt.Sprintf("%s, %d used of %d", what, u.Used, u.Total))
		}
		told[what] = true
	}
	if p := r.Problems; p != nil {
		*p = (*p)[:min(len(*p), maxProblems)]
		for i := range *p {
			(*p)[i] = clip((*p)[i], maxProblem)
		}
	}
	if h := r.Host; h != nil {
		h.Datapath = clip(h.Datapath, maxHostWord)
		h.Routes = slices.DeleteFunc(slices.Clone(h.Routes[:min(len(h.Routes), maxRoutes)]), func(p netip.Prefix) bool { return !p.IsValid() })
	}
	return most, nil
}

// has reports whether the agent holds something of an overlay.
func (r record) has(overlay string) bool {
	return slices.ContainsFunc(r.Subnets, func(h held) bool { return h.Overlay == overlay })
}

// room is how many containers fit what the agent was leased.
func (r record) room() (n int) {
	for _, h := range r.Subnets {
		var fit [2]uint64 // by family
		for _, b := range h.all() {
			for _, p := range b.Prefixes() {
				f := &fit[p.Addr().BitLen()>>7]
				*f = min(*f+conf.Containers(p), uint64(len(conf.Halves))*conf.BridgePorts)
			}
		}
		n += int(max(fit[0], fit[1]))
	}
	return n
}

// refs are the agents in the order of searches, superseded ones left out.
func (c *Coordinator) refs() []attached.Ref {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ordered == nil {
		refs := make([]attached.Ref, 0, len(c.view.agents))
		for id, a := range c.view.agents {
			if a.Superseded == "" {
				refs = append(refs, attached.Ref{ID: id, IP: a.IP})
			}
		}
		slices.SortFunc(refs, attached.Less)
		c.ordered = refs
	}
	return c.ordered
}

// asked are the agents that a query names, by id or IP; all of them where it
// names none.
func (c *Coordinator) asked(name string) []attached.Ref {
	refs := c.refs()
	if name == "" {
		return refs
	}
	ip, _ := netip.ParseAddr(name)
	i := slices.IndexFunc(refs, func(r attached.Ref) bool { return r.ID == name || r.IP == ip })
	if i < 0 {
		return nil
	}
	return refs[i : i+1]
}

// unreported is how many connected agents have not said yet what they have.
func (c *Coordinator) unreported(refs []attached.Ref) (n int) {
	if c.book.Agents() >= len(refs) {
		return 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ref := range refs {
		if p := c.presence[ref.ID]; (p != nil && len(p.watches) > 0 || c.connectedElsewhereLocked(ref.ID)) && !c.book.Has(ref.ID) {
			n++
		}
	}
	return n
}

func (c *Coordinator) serveContainers(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	q := attached.Query{Overlay: query.Get("overlay"), Text: strings.TrimSpace(query.Get("q")), After: query.Get("after"), Limit: defaultPage}
	if s := query.Get("limit"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > maxPage {
			return refuse(http.StatusBadRequest, "limit %.80q: want a number from 1 to %d", s, maxPage)
		}
		q.Limit = n
	}
	refs := c.asked(query.Get("agent"))
	found, err := c.book.Search(refs, q)
	if err != nil {
		return refuse(http.StatusBadRequest, "%v", err)
	}
	c.leaveOutOthers(found.Containers)
	found.Unreported, found.Incomplete = c.unreported(refs), c.incomplete()
	serve.WriteJSON(w, http.StatusOK, found)
	return nil
}

// leaveOutOthers takes out the addresses that are granted to another host than the one
// that reports them: they lead there. A host may have containers of a subnet that it
// lost, or lie.
func (c *Coordinator) leaveOutOthers(found []api.Container) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range found {
		x := &found[i]
		a := c.view.agents[x.AgentID]
		x.Addresses = slices.DeleteFunc(x.Addresses, func(addr netip.Addr) bool {
			return (a == nil || !a.contains(addr)) && c.view.granted(addr)
		})
	}
}

// contains reports whether an address is of what the agent was leased.
func (r *record) contains(addr netip.Addr) bool {
	return slices.ContainsFunc(r.Subnets, func(h held) bool {
		return slices.ContainsFunc(h.all(), func(b conf.Block) bool { return b.Subnet.Contains(addr) || b.Subnet6.Contains(addr) })
	})
}

// granted reports whether an address is of an agent subnet that somebody has.
func (v *view) granted(addr netip.Addr) bool {
	for _, o := range v.network.Overlays {
		pool, bits := v.pools.overlays[o.Name].v4, o.Prefix
		if addr.Is6() {
			pool, bits = v.pools.overlays[o.Name].v6, o.Prefix6
		}
		if block, err := addr.Prefix(bits); err == nil && pool != nil && pool.InUse(block) {
			return true
		}
	}
	return false
}

func (c *Coordinator) serveAddresses(w http.ResponseWriter, r *http.Request) error {
	serve.WriteJSON(w, http.StatusOK, c.Addresses(r.URL.Query().Get("overlay"), r.URL.Query().Get("agent")))
	return nil
}

// Addresses is how full the halves are, of all agents and overlays or of one.
func (c *Coordinator) Addresses(overlay, agent string) api.Addresses {
	out := api.Addresses{Overlays: []api.OverlayAddresses{}, Agents: []api.AgentAddresses{}}
	type half struct {
		overlay string
		half    conf.Half
	}
	sums := map[half]api.Count{}
	refs := c.asked(agent)
	for _, ref := range refs {
		usage, _ := c.book.Usage(ref.ID)
		for _, u := range usage {
			if overlay != "" && u.Overlay != overlay {
				continue
			}
			key := half{u.Overlay, u.Half}
			sums[key] = sums[key].Plus(u.Count)
			out.Agents = append(out.Agents, api.AgentAddresses{AgentID: ref.ID, AgentIP: ref.IP, HalfUsage: u, Level: u.Level()})
		}
	}
	for key, sum := range sums {
		out.Overlays = append(out.Overlays, api.OverlayAddresses{Overlay: key.overlay, Half: key.half, Count: sum, Level: sum.Level()})
	}
	slices.SortFunc(out.Overlays, func(a, b api.OverlayAddresses) int {
		return strings.Compare(a.Overlay+"\x00"+halfOrder(a.Half), b.Overlay+"\x00"+halfOrder(b.Half))
	})
	out.Unreported, out.Incomplete = c.unreported(refs), c.incomplete()
	return out
}

// addressMetrics are about what all agents report together.
func (c *Coordinator) addressMetrics(p *metrics.Page) {
	all := c.Addresses("", "")
	for _, o := range all.Overlays {
		const name, help = "overlay_coordinator_addresses", "Addresses of all agents together, by what they are."
		for state, n := range map[string]uint64{"used": o.Used, "cooling": o.Cooling, "free": o.Free} {
			p.Gauge(name, help, float64(n), "overlay", o.Overlay, "half", string(o.Half), "state", state)
		}
	}
	for _, o := range all.Overlays {
		for _, level := range []api.Level{api.LevelWarning, api.LevelFull} {
			n := 0
			for _, a := range all.Agents {
				if a.Overlay == o.Overlay && a.Half == o.Half && a.Level == level {
					n++
				}
			}
			p.Gauge("overlay_coordinator_nearly_full_halves", "Agents whose half is nearly full, or full.", float64(n), "overlay", o.Overlay, "half", string(o.Half), "level", string(level))
		}
	}
	for _, o := range c.network().Overlays {
		p.Gauge("overlay_coordinator_containers", "Containers of all agents together.", float64(c.book.Total(o.Name)), "overlay", o.Name)
	}
}

// halfOrder puts the lower half first.
func halfOrder(h conf.Half) string { return strconv.Itoa(slices.Index(conf.Halves[:], h)) }
