package agent

import (
	"errors"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// keepDirs makes directories anew that somebody removed while we run, and puts
// back what belongs into the one that survives a reboot: without it this host
// would be another at the next start, with other subnets. A single file is not
// put back; who removes the agent id of a copied host means it.
func (l *loop) keepDirs() {
	var errs []error
	if l.files.run.removed() {
		errs = append(errs, l.files.run.open())
	}
	if l.files.store.removed() {
		l.published.putBack = true
		errs = append(errs, l.files.store.open())
	}
	err := errors.Join(errs...)
	if l.published.putBack && err == nil {
		err = errors.Join(conf.WriteFile(l.files.id(), []byte(l.id+"\n"), 0o600, ""), l.instance.write())
		if l.opts.KeepIdentity != nil {
			err = errors.Join(err, l.opts.KeepIdentity())
		}
		if err == nil {
			l.published.putBack = false
			l.log.Warn("somebody removed the state directory; put back", logkey.Path, l.files.store.path)
			l.peers.save.in(0)
			if l.lease.held != nil {
				l.lease.stored = 0 // if it cannot be stored now, then with the next renewal
				l.saveLease()
			}
		}
	}
	l.problems.Report(directoriesProblem, err)
}
