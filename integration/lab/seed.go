package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/go-cmp/cmp"
)

// Seed is the cluster of the overlay's first document: a host without bridges,
// as a DC/OS master is, with the coordinator on it, and two agents. Beside them
// stands a machine on the underlay that knows no overlay.
type Seed struct {
	*Lab
	Config      string // cluster configuration, YAML
	Coordinator *Coordinator
	Second      *Coordinator // nil without Options.Etcd
	Master      *Host        // 172.17.0.2
	Agents      []*Host      // 172.17.0.4, 172.17.0.3
	Outside     *Node        // 172.17.0.200
	Containers  []*Container
}

// SeedOverlays are the overlays of the seed's first configuration.
var SeedOverlays = []string{"dcos", "dcos6"}

// NewSeed makes underlay and hosts; nothing runs yet.
func NewSeed(ctx context.Context, o Options, config string) (s *Seed, err error) {
	s = &Seed{Config: config}
	if s.Lab, err = New(ctx, o); err != nil {
		return nil, err
	}
	if err := s.makeHosts(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Seed) makeHosts(ctx context.Context) (err error) {
	if s.Master, err = s.Host(ctx, "master", 2); err != nil {
		return err
	}
	for i, n := range []byte{4, 3} {
		h, err := s.Host(ctx, fmt.Sprintf("agent%d", i+1), n)
		if err != nil {
			return err
		}
		s.Agents = append(s.Agents, h)
	}
	if s.Outside, err = s.Node(ctx, "outside", 200); err != nil {
		return err
	}
	if err := s.Serve(ctx, s.Outside.Netns); err != nil {
		return err
	}
	return s.Serve(ctx, s.Master.Netns)
}

// Hosts are all on which an agent runs.
func (s *Seed) Hosts() []*Host { return append([]*Host{s.Master}, s.Agents...) }

// StartCoordinator starts the coordinator on the master. With Options.Etcd it
// starts etcd there first, and another coordinator on the first agent's host.
func (s *Seed) StartCoordinator(ctx context.Context) (err error) {
	if s.etcd {
		if err := s.startEtcd(ctx, s.Master.Node); err != nil {
			return err
		}
	}
	if s.Coordinator, err = s.Lab.StartCoordinator(ctx, s.Master.Node, s.Config); err != nil || !s.etcd {
		return err
	}
	s.Second, err = s.startSecond(ctx, s.Coordinator, s.Agents[0].Node)
	return err
}

// StartAgent starts the agent of one of Hosts.
func (s *Seed) StartAgent(h *Host) error {
	if h == s.Master {
		return h.StartAgent(s.Coordinator.URL, "--bridges", "none")
	}
	return h.StartAgent(s.Coordinator.URL)
}

// Up starts everything, in the order of the seed's state, and waits until every
// host can reach every other.
func (s *Seed) Up(ctx context.Context) error {
	if err := s.StartCoordinator(ctx); err != nil {
		return err
	}
	for _, h := range s.Hosts() {
		if err := s.StartAgent(h); err != nil {
			return err
		}
		if err := h.WaitRegistered(ctx, s.Coordinator); err != nil {
			return err
		}
		if err := h.WaitReady(ctx); err != nil {
			return err // the runtimes find their files from then on
		}
	}
	return s.WaitMesh(ctx)
}

// WaitMesh waits until every host can reach every other; see WaitMesh.
func (s *Seed) WaitMesh(ctx context.Context) error { return WaitMesh(ctx, s.Hosts()...) }

// Placement is one container to be.
type Placement struct {
	Agent         int // index in Agents
	Name          string
	Overlay, Half string
}

// Placements are one container on each half of each overlay on both agents, and
// on the first a second one each, so that there is a pair within one half.
func Placements() []Placement {
	var out []Placement
	for _, overlay := range SeedOverlays {
		for agent, n := range []int{2, 1} {
			for _, half := range []string{Mesos, Docker} {
				for i := range n {
					out = append(out, Placement{agent, fmt.Sprintf("%s-%c%d", overlay, half[0], i+1), overlay, half})
				}
			}
		}
	}
	return out
}

// Place attaches a container and lets it answer.
func (s *Seed) Place(ctx context.Context, p Placement) (*Container, error) {
	c, err := s.Agents[p.Agent].Attach(ctx, p.Name, p.Overlay, p.Half)
	if err != nil {
		return nil, err
	}
	s.Containers = append(s.Containers, c)
	return c, s.Serve(ctx, c.Netns)
}

// PlaceAll attaches all of Placements.
func (s *Seed) PlaceAll(ctx context.Context) error {
	for _, p := range Placements() {
		if _, err := s.Place(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

func (c *Container) endpoint() Endpoint { return Endpoint{c.Short, c.Netns, c.Addr()} }

// Pairs are all that must talk: containers of one overlay with each other, the
// master and the container's own host with each container, each container with
// the master's VTEP and host address, and with the machine outside.
func (s *Seed) Pairs() ([]Pair, error) {
	vtep4, vtep6, err := s.Master.VTEP()
	if err != nil {
		return nil, err
	}
	// pick returns the address of the container's family.
	pick := func(c *Container, v4, v6 netip.Addr) netip.Addr {
		if c.Addr().Is4() {
			return v4
		}
		return v6
	}
	var pairs []Pair
	add := func(p Pair) {
		if p.To.Addr.IsValid() { // the other side has this family
			pairs = append(pairs, p)
		}
	}
	for _, c := range s.Containers {
		self := c.endpoint()
		for _, d := range s.Containers {
			if c != d && c.Overlay == d.Overlay {
				// The other side must see the container itself.
				add(Pair{Kind: kind(c, d), From: self, To: d.endpoint(), Seen: self.Addr})
			}
		}
	}
	for _, c := range s.Containers {
		self := c.endpoint()
		host := pick(c, c.Host.IP, c.Host.IP6)
		vtep := Endpoint{"master's VTEP", s.Master.Netns, pick(c, vtep4, vtep6)}
		master := Endpoint{"master", s.Master.Netns, pick(c, s.Master.IP, s.Master.IP6)}
		outside := Endpoint{"outside", s.Outside.Netns, pick(c, s.Outside.IP, s.Outside.IP6)}
		own := Endpoint{strings.SplitN(c.Short, "-", 2)[0], c.Host.Netns, host}
		add(Pair{Kind: "master to container", From: master, To: self})
		add(Pair{Kind: "host to its container", From: own, To: self})
		add(Pair{Kind: "container to master's VTEP", From: self, To: vtep})
		// What leaves the overlays carries the host's address.
		add(Pair{Kind: "container to master", From: self, To: master, Seen: host})
		add(Pair{Kind: "container to outside", From: self, To: outside, Seen: host})
	}
	return pairs, nil
}

func kind(a, b *Container) string {
	half, host := "same half", "same host"
	if a.Half != b.Half {
		half = "other half"
	}
	if a.Host != b.Host {
		host = "other host"
	}
	return host + ", " + half
}

// DiffState compares two states as JSON values and says how they differ; empty
// when they do not.
func DiffState(got, want []byte) string {
	var g, w any
	if err := json.Unmarshal(want, &w); err != nil {
		return "the wanted state: " + err.Error()
	}
	if err := json.Unmarshal(got, &g); err != nil {
		return "the state: " + err.Error()
	}
	return cmp.Diff(w, g)
}
