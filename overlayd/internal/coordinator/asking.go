package coordinator

import (
	"context"
	"time"
)

// Agents whose containers are not known here are asked for them, over the stream of
// peers, and not before: so the reports of a whole cluster come when there is time
// for them, and those that want a lease are served first.
const (
	// askEvery is the time between two looks at who is to be asked.
	askEvery = 50 * time.Millisecond
	// askAtOnce is how many are asked at a time while at most calm want a lease: all of
	// 65,536 within the half minute after which everything is to be known again.
	// askBusy is how many while more do: few, because each report holds up who joins.
	askAtOnce = 150
	askBusy   = 5
	calm      = 2
)

// askToReportLocked has an agent asked, soon.
func (c *Coordinator) askToReportLocked(id string) {
	c.unheard[id] = struct{}{}
	select {
	case c.asking <- struct{}{}:
	default:
	}
}

// askForReports asks until ctx ends.
func (c *Coordinator) askForReports(ctx context.Context) {
	for {
		select {
		case <-c.asking:
		case <-ctx.Done():
			return
		}
		for c.askSome() {
			select {
			case <-time.After(askEvery):
			case <-ctx.Done():
				return
			}
		}
	}
}

// askSome asks the next agents, and reports whether there are more. Those that do not
// follow here are asked when they do.
func (c *Coordinator) askSome() (more bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := askAtOnce
	if c.joining.Load() > calm {
		n = askBusy
	}
	for id := range c.unheard {
		if n--; n < 0 {
			return true
		}
		delete(c.unheard, id)
		p := c.presence[id]
		if p == nil {
			continue
		}
		for w := range p.watches {
			w.report = true
			w.rouse()
		}
	}
	return false
}
