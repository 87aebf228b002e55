// Package published reads the document that the agent of a host publishes,
// <run-dir>/state.json, for those who give out addresses: the CNI programs and the
// driver of Docker. It refuses a state that does not allow that, with the reason.
package published

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/document"
)

// Reason says why no address can be given out.
type Reason int

// The reasons. What passes without anybody doing something is Pending or Expired.
const (
	Pending   Reason = iota // the agent has not published, or not this overlay's subnet yet
	Invalid                 // the document cannot be read, or makes no sense
	Expired                 // the lease has run out because it could not be renewed
	Lost                    // the lease is lost to another host
	NoOverlay               // the overlay is not leased here, or has no bridge of this half
	Draining                // the overlay is being drained
)

// Error is every error of this package.
type Error struct {
	Reason Reason
	text   string
	err    error
}

func (e *Error) Error() string { return e.text }
func (e *Error) Unwrap() error { return e.err }

func errorf(r Reason, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Reason: r, text: err.Error(), err: errors.Unwrap(err)}
}

// Load reads what the agent has published in a run directory. The state comes with
// the error as far as it was read. The error is an *Error.
func Load(runDir string) (conf.State, error) {
	var s conf.State
	path := filepath.Join(runDir, conf.StateFile)
	b, err := conf.ReadFile(path)
	if err == nil {
		if err = document.ReadState(b, &s); err != nil {
			err = fmt.Errorf("read %s: %w", path, err)
		} else if problem := ofHost(s); problem != "" {
			err = fmt.Errorf("read %s: %s", path, problem)
		}
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return s, errorf(Pending, "%s is not there: the agent of this host has not published yet; see that \"overlayd agent\" runs, with --run-dir %s", path, runDir)
	case err != nil:
		return s, errorf(Invalid, "published state: %w; restart \"overlayd agent\"", err)
	}
	boot, err := conf.BootID()
	if err != nil {
		return s, errorf(Invalid, "%w", err)
	}
	switch {
	case s.BootID != boot:
		return s, errorf(Pending, "%s is from before the last reboot: the agent of this host has not published since; see that \"overlayd agent\" runs", path)
	case s.Lease.Lost != "":
		return s, errorf(Lost, "the lease of this host is lost: %s; no new container can be attached", s.Lease.Lost)
	case int64(conf.Boottime()) > s.Lease.ExpiresBoottime:
		return s, errorf(Expired, "the lease of this host has run out because the coordinator could not be reached; no new container can be attached until it is renewed")
	}
	return s, nil
}

// Overlay finds the overlay and its bridge of one half in the state. The error is
// an *Error.
func Overlay(s conf.State, name string, half conf.Half) (conf.AgentOverlay, *conf.Bridge, error) {
	o, ok := s.Overlay(name)
	if !ok {
		return o, nil, errorf(NoOverlay, "overlay %s is not known on this host; check the name, and that the coordinator's configuration has it enabled", name)
	}
	if problem := ofOverlay(s, o); problem != "" {
		return o, nil, errorf(Invalid, "published state: %s; restart \"overlayd agent\"", problem)
	}
	if err := Drained(o); err != nil {
		return o, nil, err
	}
	if b := o.Bridge(half); b != nil {
		return o, b, nil
	}
	switch {
	case o.Subnet.IsValid() || o.Subnet6.IsValid():
		return o, nil, errorf(NoOverlay, "overlay %s has no bridge for the %s half on this host; its agent runs with other --bridges", name, half)
	case o.State != nil && o.State.Error != "":
		return o, nil, errorf(Pending, "overlay %s has no subnet on this host: %s", name, o.State.Error)
	}
	return o, nil, errorf(Pending, "overlay %s has no subnet on this host yet", name)
}

// Drained refuses an overlay that is being drained. The error is an *Error.
func Drained(o conf.AgentOverlay) error {
	if !o.Info.Draining {
		return nil
	}
	return errorf(Draining, "overlay %s is being drained: no new container is attached to it on any host, and those that are go on; "+
		"use another overlay, or end it with \"overlayctl overlays undrain %s\"", o.Info.Name, o.Info.Name)
}

// HasRoom reports whether the agent can get a further block of the overlay now.
func HasRoom(s conf.State, overlay string) bool {
	return s.Lease.Error == "" && slices.Contains(s.Room, overlay)
}
