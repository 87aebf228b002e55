package attach

import (
	"context"
	"errors"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/antispoof"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// del detaches a container. It needs to know the attachment and nothing else:
// not the namespace, the published state or the result of ADD, any of which may
// be gone. What is gone already is success.
//
// The interface goes first and its address only then, so that no address is
// free while an interface still has it, wherever the program is killed. Nor is one free
// to which a host port may still lead: where that cannot be taken away, the interface
// goes, and the address stays until DEL is repeated or the agent finds it abandoned.
func (p program) del(ctx context.Context, c *cni.Call) error {
	rebuildFromLinks(c)
	if isLoop(c) {
		return nil // the one that called holds the lock
	}
	unlock, err := lock(ctx, c.Conf.RunDirectory(), c.Attachment().Key())
	if err != nil {
		return kernelError(err)
	}
	defer unlock()
	unmapped := unmapPorts(ctx, c)
	crash("unmapped")
	aliases, answered, err := removeHostEnds(c.Attachment(), c.Conf.RunDirectory())
	if err != nil {
		return errors.Join(kernelError(err), unmapped)
	}
	crash("unlinked")
	if unmapped != nil {
		return errors.Join(kernelError(answered()), unmapped)
	}
	_, err = cni.Release(ctx, c)
	if len(aliases) == 0 {
		aliases = shortAliases(c)
	}
	for _, a := range aliases {
		err = errors.Join(err, releaseAlias(ctx, c, a))
	}
	crash("released")
	err = errors.Join(err, kernelError(answered()))
	if delegates(c.Conf) {
		err = errors.Join(err, delegateDel(ctx, c))
	}
	return err
}

// removeHostEnds removes the host end of the attachment and returns what it
// said; see removeHost. Both halves are looked at: the configuration may have changed
// its type since ADD.
func removeHostEnds(att conf.Attachment, dir string) (aliases []mark.Alias, answered func() error, _ error) {
	conn, err := rtnl.Open()
	if err != nil {
		return nil, nil, err
	}
	defer conn.Close()
	t := openTurn(dir)
	var names []string
	var answers []func() error
	answered = func() error {
		defer t.close()
		var errs []error
		for _, one := range answers {
			errs = append(errs, one())
		}
		return errors.Join(errs...)
	}
	for _, half := range conf.Halves {
		name := mark.HostEnd(half, att.Key())
		alias, one, err := removeHost(conn, name, t)
		if err != nil {
			return nil, nil, errors.Join(err, answered())
		}
		answers = append(answers, one)
		if alias.Overlay != "" {
			aliases = append(aliases, alias)
		}
		names = append(names, name)
	}
	if len(aliases) > 0 {
		return aliases, answered, nil
	}
	// The link had gone before, and with it what it says: the elements of all
	// containers have to be read, which a customary DEL need not pay for.
	if err := supported(antispoof.ReleaseDevice(names...)); err != nil {
		return nil, nil, errors.Join(err, answered())
	}
	return nil, answered, nil
}

// shortAliases are what a link may have said that has gone without telling us: a DEL
// that was killed had it removed.
func shortAliases(c *cni.Call) (out []mark.Alias) {
	for _, att := range mark.ShortNames(c.Attachment()) {
		out = append(out, mark.Alias{Overlay: c.Conf.OverlayName(), Attachment: att})
	}
	return out
}

// releaseAlias releases what the link said it had, where that is kept under
// another name than the configuration now gives: the overlay has changed since
// ADD, or the store was rebuilt from an alias that could not hold all names.
func releaseAlias(ctx context.Context, c *cni.Call, a mark.Alias) error {
	var errs []error
	for _, att := range [...]conf.Attachment{c.Attachment(), a.Attachment} {
		if a.Overlay == c.Conf.OverlayName() && att == c.Attachment() {
			continue // done
		}
		then := *c
		then.Conf.Overlay, then.Conf.Name = a.Overlay, att.Network
		then.ContainerID, then.IfName = att.ContainerID, att.IfName
		_, err := cni.Release(ctx, &then)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
