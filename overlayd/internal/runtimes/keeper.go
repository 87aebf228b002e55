package runtimes

import (
	"context"
	"os"
	"reflect"
	"sync"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/dirwatch"
	"overlayd.internal/overlay/overlayd/internal/problems"
)

// How soon a Keeper repairs what somebody changed, and how often at most, so
// that it fights nobody at full speed.
const (
	coalesce  = 200 * time.Millisecond
	leastTime = 500 * time.Millisecond
)

// Keeper keeps the files of the runtimes on a goroutine of its own: it runs
// plugins of others to ask for their versions, and disks may be slow. Somebody
// who removes or changes a file finds it put back within a second.
type Keeper struct {
	files    Files
	problems *problems.Set // that only cost time
	every    time.Duration
	wake     chan struct{} // capacity 1: Set was called
	done     chan error

	mu     sync.Mutex
	wanted []conf.AgentOverlay
	set    bool
}

// NewKeeper returns a Keeper that looks at the files at least that often.
func NewKeeper(files Files, every time.Duration) *Keeper {
	return &Keeper{
		files: files, problems: problems.New(files.Log), every: every,
		wake: make(chan struct{}, 1), done: make(chan error),
	}
}

// Set says which overlays there should be files for. It does not block. Before
// it was called nothing is touched.
func (k *Keeper) Set(overlays []conf.AgentOverlay) {
	k.mu.Lock()
	same := k.set && reflect.DeepEqual(k.wanted, overlays)
	k.wanted, k.set = overlays, true
	k.mu.Unlock()
	if same {
		return
	}
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// Done receives what came of each look at the files, if that differs from the
// one before or Set asked for it.
func (k *Keeper) Done() <-chan error { return k.done }

// Run keeps the files until ctx is done, then returns nil.
func (k *Keeper) Run(ctx context.Context) error {
	watch := dirwatch.New()
	defer watch.Close()
	timer := time.NewTimer(k.every)
	defer timer.Stop()
	var last time.Time
	text := ""
	for {
		asked := false
		select {
		case <-ctx.Done():
			return nil
		case <-k.wake:
			asked = true
		case <-watch.Events():
			if !sleep(ctx, max(coalesce, leastTime-time.Since(last))) {
				return nil
			}
		case <-timer.C:
		}
		k.mu.Lock()
		overlays, set := k.wanted, k.set
		k.mu.Unlock()
		if !set {
			continue // the timer is set by the first look
		}
		drain(watch.Events()) // what came until now is looked at
		unwatched := watch.Add(k.dirs()...)
		err := k.files.Sync(ctx, overlays)
		if unwatched == nil {
			unwatched = watch.Add(k.dirs()...) // those that were made just now
		}
		if ctx.Err() != nil {
			return nil
		}
		k.problems.Report("watching the files of the container runtimes", unwatched)
		last = time.Now()
		timer.Reset(k.every)
		if !asked && text == errorText(err) {
			continue
		}
		text = errorText(err)
		select {
		case k.done <- err:
		case <-ctx.Done():
			return nil
		}
	}
}

// dirs are the directories that exist: Sync has made those it could, and said
// why it could not.
func (k *Keeper) dirs() (out []string) {
	for _, dir := range []string{k.files.CNIConfDir, k.files.UCRConfDir} {
		if fi, err := os.Stat(dir); err == nil && fi.IsDir() {
			out = append(out, dir)
		}
	}
	return out
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func drain(events <-chan struct{}) {
	select {
	case <-events:
	default:
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
