// Package audit compares what the three books of a host say about addresses:
// the address stores, the kernel's links, and the lease the agent published. It
// repairs nothing and needs no agent to run.
//
//	address store      link (alias, bridge)     state.json
//	attachment ------- same attachment,
//	  addresses ------ same addresses ---------- in the half's range
package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/internal/veth"
	"overlayd.internal/overlay/ipam"
)

// Difference is one thing about which two of the books disagree.
type Difference struct {
	Overlay string `json:"overlay,omitempty"` // empty: of the whole host
	// Text says what differs and what to do, in one line.
	Text string `json:"text"`
}

func (d Difference) String() string {
	if d.Overlay == "" {
		return d.Text
	}
	return "overlay " + d.Overlay + ": " + d.Text
}

// settling is how long a difference has to last: an ADD or DEL that is under
// way has its address before its interface, or still.
const settling = 300 * time.Millisecond

// Check reads all three books of the host whose run directory this is, in the
// current network namespace, and returns every difference that lasts.
func Check(ctx context.Context, runDir string) ([]Difference, error) {
	return Lasting(ctx, func() ([]Difference, error) {
		h, err := Read(ctx, runDir)
		if err != nil {
			return nil, err
		}
		return Compare(h), nil
	})
}

// Lasting calls look, and once more after a moment if it found anything, and
// returns what it found both times.
func Lasting(ctx context.Context, look func() ([]Difference, error)) ([]Difference, error) {
	first, err := look()
	if err != nil || len(first) == 0 {
		return nil, err
	}
	if err := settle(ctx); err != nil {
		return nil, err
	}
	again, err := look()
	if err != nil {
		return nil, err
	}
	var lasting []Difference
	for _, d := range again {
		if slices.Contains(first, d) {
			lasting = append(lasting, d)
		}
	}
	return lasting, nil
}

// settle waits for what is under way to end.
func settle(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(settling):
		return nil
	}
}

// Host is what the books of one host say.
type Host struct {
	Boot     string
	State    conf.State
	StateErr error // why State could not be read; fs.ErrNotExist: nothing is published
	Stores   map[string]Store
	Links    []veth.Link
	// Unmarked are links that have the name of a host end and no alias of ours.
	Unmarked []string
	// Altered are links of containers whose name or alias was changed by others, by the
	// name of the host end. A container goes on with its addresses behind such a link.
	Altered map[string]string
}

// Store is one overlay's address store.
type Store struct {
	Records  []ipam.Record
	Problems []string          // from ipam's own verification
	Err      error             // it could not be read
	Usage    []Usage           // of the halves that the host has
	Gone     map[conf.Key]bool // the record's namespace is no longer; see netns.Ref
	// EarlierBoot: nobody has opened it in this one.
	EarlierBoot bool
}

// Read reads the books.
func Read(ctx context.Context, runDir string) (Host, error) {
	h, err := ReadState(runDir)
	if err != nil {
		return h, err
	}
	if err := h.readKernel(); err != nil {
		return h, err
	}
	dir := filepath.Join(runDir, conf.IPAMDir)
	files, err := filepath.Glob(filepath.Join(dir, "*.db"))
	if err != nil {
		return h, fmt.Errorf("look for address stores in %s: %w", dir, err)
	}
	for _, file := range files {
		overlay := strings.TrimSuffix(filepath.Base(file), ".db")
		if conf.CheckName(overlay) == nil {
			h.Stores[overlay] = h.readStore(ctx, dir, overlay)
		}
	}
	return h, nil
}

// ReadState is Read without the address stores and without the kernel.
func ReadState(runDir string) (h Host, err error) {
	h.Stores = map[string]Store{}
	if _, err := os.Stat(runDir); err != nil {
		return h, fmt.Errorf("run directory: %w", err) // misspelt, or no agent was ever here
	}
	if h.Boot, err = conf.BootID(); err != nil {
		return h, err
	}
	h.StateErr = conf.ReadJSON(filepath.Join(runDir, conf.StateFile), &h.State)
	return h, nil
}

// readStore reads a store as it is at this moment. A damaged one is not rebuilt.
func (h Host) readStore(ctx context.Context, dir, overlay string) (out Store) {
	s, err := ipam.TakeSnapshot(ctx, ipam.Options{
		Dir: dir, Overlay: overlay, Cooling: time.Duration(h.State.CoolingSeconds) * time.Second,
	})
	if err != nil {
		return Store{Err: err}
	}
	defer s.Close()
	out.EarlierBoot = s.EarlierBoot()
	if out.Problems, out.Err = s.Verify(ctx); out.Err != nil || len(out.Problems) > 0 {
		return out
	}
	if out.Records, out.Err = s.List(ctx); out.Err != nil {
		return out
	}
	out.Gone = map[conf.Key]bool{}
	for _, rec := range out.Records {
		out.Gone[rec.Key()] = rec.NetNS.Gone()
	}
	o, _ := h.State.Overlay(overlay)
	out.Usage, out.Err = usage(ctx, o, s.Stats)
	return out
}

func (h *Host) readKernel() error {
	c, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	links, err := c.Links()
	if err != nil {
		return err
	}
	h.take(links)
	return nil
}

// take takes in the links of the host.
func (h *Host) take(links []rtnl.Link) {
	h.Links, h.Altered = veth.Of(links), map[string]string{}
	marked := map[string]bool{}
	for _, l := range h.Links {
		marked[l.Name] = true
	}
	for _, l := range links {
		if l.Kind != "veth" || marked[l.Name] {
			continue
		}
		if alias, ours := mark.ParseAlias(l.Alias); ours {
			h.Altered[mark.HostEnd(alias.Half, alias.Key())] = l.Name
		}
		if !mark.LooksLikeHostEnd(l.Name) {
			continue
		}
		h.Unmarked = append(h.Unmarked, l.Name)
		// There is an alias before the container's end comes up: a killed ADD has left
		// one that has neither.
		if l.Alias != "" || l.Carrier() {
			h.Altered[l.Name] = l.Name
		}
	}
}

// Compare finds the differences. It changes nothing and looks at nothing but h.
func Compare(h Host) []Difference {
	c := comparison{Host: h}
	c.published()
	return append(c.out, CompareAddresses(h)...)
}

// CompareAddresses is Compare without what concerns the published state as a
// whole.
func CompareAddresses(h Host) []Difference {
	c := comparison{Host: h}
	for _, name := range c.overlays() {
		c.store(name)
	}
	for _, name := range h.Unmarked {
		c.add("", "interface %s has the name of a container's and no alias that says whose it is; remove it: ip link delete %s", name, name)
	}
	return c.out
}

type comparison struct {
	Host
	out []Difference
}

func (c *comparison) add(overlay, format string, args ...any) {
	c.out = append(c.out, Difference{Overlay: overlay, Text: fmt.Sprintf(format, args...)})
}

// published compares the published state with this boot.
func (c *comparison) published() {
	switch {
	case errors.Is(c.StateErr, fs.ErrNotExist):
		if len(c.Stores) > 0 || len(c.Links) > 0 {
			c.add("", "containers are or were attached, and the agent has published nothing; start \"overlayd agent\" with this run directory")
		}
	case c.StateErr != nil:
		c.add("", "the published state cannot be read: %v; restart \"overlayd agent\"", c.StateErr)
	case c.State.BootID != c.Boot:
		c.add("", "the published state is of an earlier boot; see that \"overlayd agent\" runs")
	}
}
