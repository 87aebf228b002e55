package pki

import (
	"net/netip"
	"sync"
	"time"
)

// Whoever shows tokens that are none may do so guessBurst times, and then once in
// guessPause. A host that shows good ones only is never held up.
const (
	guessBurst = 10
	guessPause = 6 * time.Second
	maxGuesses = 10_000 // hosts that are remembered
)

// guesses counts wrong tokens by host. Of IPv6, a host is a /64.
type guesses struct {
	mu    sync.Mutex
	until map[netip.Prefix]time.Time // when all that was guessed will be forgotten
}

func guesser(from netip.Addr) netip.Prefix {
	bits := 32
	if from = from.Unmap().WithZone(""); from.Is6() {
		bits = 64
	}
	p, err := from.Prefix(bits)
	if err != nil { // over a socket
		return netip.Prefix{}
	}
	return p
}

// wait is how long nothing is looked at that comes from a host.
func (g *guesses) wait(from netip.Addr, now time.Time) time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	until, counted := g.until[guesser(from)]
	if !counted {
		return 0
	}
	return until.Sub(now) - (guessBurst-1)*guessPause
}

// wrong counts one more.
func (g *guesses) wrong(from netip.Addr, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.until == nil {
		g.until = map[netip.Prefix]time.Time{}
	}
	if len(g.until) >= maxGuesses {
		for host, until := range g.until {
			if !until.After(now) || len(g.until) >= maxGuesses { // at worst one is forgotten too early
				delete(g.until, host)
			}
		}
	}
	until := g.until[guesser(from)]
	if until.Before(now) {
		until = now
	}
	g.until[guesser(from)] = until.Add(guessPause)
}
