// Package systemd tells the service manager that started us that we are ready,
// and then that we are alive. Without a service manager it does nothing.
package systemd

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// Service is the unit that we run in. It is safe for concurrent use.
type Service struct {
	log   *slog.Logger
	ready sync.Once
}

// New describes the unit of this process.
func New(log *slog.Logger) *Service { return &Service{log: log} }

// Beat says that the caller's work goes on. The first call ends the start of the
// unit; the others feed its watchdog.
func (s *Service) Beat() {
	s.ready.Do(func() { s.notify(daemon.SdNotifyReady) })
	s.notify(daemon.SdNotifyWatchdog)
}

// Watch calls alive twice within each period of the unit's watchdog, until ctx
// ends, and beats when it has returned. alive may wait for a lock: if it never
// gets it, the watchdog restarts the unit.
func (s *Service) Watch(ctx context.Context, alive func()) error {
	period, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("read the watchdog settings of the unit: %w", err)
	}
	s.Beat()
	if period == 0 {
		return nil
	}
	tick := time.NewTicker(period / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			alive()
			s.Beat()
		}
	}
}

func (s *Service) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.log.Warn("cannot notify the service manager", logkey.What, state, logkey.Err, err)
	}
}
