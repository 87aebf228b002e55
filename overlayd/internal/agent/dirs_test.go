package agent

import (
	"errors"
	"log/slog"
	"os"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
)

// Whoever removes the agent's directories while it runs takes neither the
// attaching of containers nor the identity of the host.
func TestDirectoriesRemoved(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("other", "172.17.0.2")
	h := newHost(c)
	h.tune = func(t *timing) { t.resync, t.socket = 200*time.Millisecond, 20*time.Millisecond }
	h.start()
	h.ready()
	id, before := h.id(), h.document()
	kept := []string{h.stored(idFile), h.stored(leaseFile), h.stored(peersFile), h.path(conf.StateFile), h.path(conf.SocketFile)}
	allThere := func() error {
		var errs []error
		for _, path := range kept {
			errs = append(errs, exists(path, true))
		}
		return errors.Join(errs...)
	}
	eventually(t, "all files are there", allThere)

	// In one step each: what is put back meanwhile would keep them from being removed.
	for _, dir := range []string{h.opts.RunDir, h.opts.StateDir} {
		must(t, os.Rename(dir, dir+".removed"))
		must(t, os.RemoveAll(dir+".removed"))
	}
	eventually(t, "all files are back", allThere)
	h.ready()
	if now := h.document(); now.Lease != before.Lease {
		t.Errorf("published is %+v, before it was %+v", now.Lease, before.Lease)
	}
	if _, err := openFiles(h.opts.RunDir, h.opts.StateDir, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("another agent can have the directories")
	}
	if got := h.id(); got != id {
		t.Errorf("agent id %s, before it was %s", got, id)
	}
	h.restart()
	h.ready()
	if now := h.document(); h.id() != id || now.Lease.Epoch != before.Lease.Epoch {
		t.Errorf("after a restart the agent id is %s and the epoch %d, want %s and %d", h.id(), now.Lease.Epoch, id, before.Lease.Epoch)
	}

	// The id alone is removed by who wants the host to be another.
	must(t, os.Remove(h.stored(idFile)))
	must(t, os.Remove(h.path(conf.StateFile)))
	eventually(t, "the document is back", func() error { return exists(h.path(conf.StateFile), true) })
	if err := exists(h.stored(idFile), false); err != nil {
		t.Error(err)
	}
}
