package docker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/published"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/ipam/rebuild"
)

// stores are the address stores of the host, and the published document that
// says what may be taken from them: the ones the CNI programs use.
type stores struct{ runDir string }

// state is what the agent has published. Its error says why no address may be
// given out.
func (s stores) state() (conf.State, error) {
	state, err := published.Load(s.runDir)
	if problem := published.Contradiction(state); err == nil && problem != "" {
		err = fmt.Errorf("published state: %s", problem)
	}
	return state, err
}

func (s stores) dir() string { return filepath.Join(s.runDir, conf.IPAMDir) }

// open opens an overlay's store for one operation.
func (s stores) open(ctx context.Context, overlay string, cooling time.Duration) (*ipam.Store, error) {
	return ipam.Open(ctx, s.options(overlay, cooling))
}

// read is open for those who only look.
func (s stores) read(ctx context.Context, overlay string) (*ipam.Snapshot, error) {
	return ipam.TakeSnapshot(ctx, s.options(overlay, 0))
}

func (s stores) options(overlay string, cooling time.Duration) ipam.Options {
	return ipam.Options{
		Dir: s.dir(), Overlay: overlay, Cooling: cooling,
		Rebuild: func(context.Context) (ipam.Known, error) { return rebuild.Known(s.runDir, overlay) },
	}
}

// names are the overlays that have a store, also those no longer leased.
func (s stores) names() ([]string, error) {
	entries, err := os.ReadDir(s.dir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for address stores: %w", err)
	}
	var out []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".db"); ok && conf.CheckName(name) == nil {
			out = append(out, name)
		}
	}
	return out, nil
}

func (s stores) exists(overlay string) bool {
	_, err := os.Lstat(filepath.Join(s.dir(), overlay+".db"))
	return err == nil
}

// halves are the prefixes of the Docker half of the first block, IPv4 first: those
// that a network names. None where the overlay has no Docker bridge.
func halves(o conf.AgentOverlay) []netip.Prefix {
	var out []netip.Prefix
	if b := o.DockerBridge; b != nil {
		for _, p := range [...]netip.Prefix{b.IP, b.IP6} {
			if p.IsValid() {
				out = append(out, p)
			}
		}
	}
	return out
}

// rangesFor are the prefixes to take an address of the pool from.
func rangesFor(o conf.AgentOverlay, p netip.Prefix) []netip.Prefix {
	all := o.Ranges(conf.Docker)
	if p.Addr().Is6() {
		all = halves(o) // nobody answers on a link for IPv6 addresses of elsewhere
	}
	if isBystander(p) {
		return append([]netip.Prefix{p}, all...)
	}
	return all
}

// cooling is how long a released address rests.
func cooling(s conf.State) time.Duration { return time.Duration(s.CoolingSeconds) * time.Second }
