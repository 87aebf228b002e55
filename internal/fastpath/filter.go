package fastpath

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/rtnl"
)

// The names of our filters, and their place among those of others: at this
// priority, so that there is room before and behind them.
const (
	leaveFilter = mark.FilterPrefix + "leave_container"
	enterFilter = mark.FilterPrefix + "enter_host"
	priority    = 44
	handle      = 1
)

// attach makes a program the filter of that name at the ingress of a device. One
// that is there is replaced in one step.
func (p *Path) attach(index int, name string, program int) error {
	var b rtnl.Batch
	b.AddClsact("add the qdisc clsact", index)
	b.ReplaceBPF("add the filter "+name, rtnl.TCFilter{Index: index, Priority: priority, Handle: handle, Name: name}, program)
	outcome := p.conn.Each(&b)
	if err := outcome[1]; err != nil {
		if errors.Is(outcome[0], unix.EEXIST) {
			return err
		}
		return errors.Join(outcome...)
	}
	return nil
}

// Remove detaches every program of ours from the devices of this namespace,
// whichever process attached it, and answers with how many there were. The
// qdisc goes too where nothing else uses it.
func Remove() (removed int, err error) { return detachAll(func([]rtnl.TCFilter) bool { return false }) }

// Leave is Remove while containers go on: host ends keep the qdisc, which goes with
// them. A device drops what it is sent while its qdisc comes or goes (ADR 0064).
func Leave() (removed int, err error) { return detachAll(atHostEnd) }

// atHostEnd reports whether filters of ours are those of a container's interface.
func atHostEnd(ours []rtnl.TCFilter) bool {
	return slices.ContainsFunc(ours, func(f rtnl.TCFilter) bool { return f.Name == leaveFilter })
}

// detachAll detaches from all devices; keep says for the filters of one whether its
// qdisc stays.
func detachAll(keep func(ours []rtnl.TCFilter) bool) (removed int, err error) {
	conn, err := rtnl.Open()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	devices, err := conn.Clsacts()
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, index := range devices {
		n, err := detach(conn, index, keep)
		removed += n
		if err != nil {
			errs = append(errs, fmt.Errorf("detach the fast path from device %d: %w", index, err))
		}
	}
	return removed, errors.Join(errs...)
}

// detach removes our filters from a device; keep is described with detachAll.
func detach(conn *rtnl.Conn, index int, keep func(ours []rtnl.TCFilter) bool) (removed int, err error) {
	filters, err := conn.TCFilters(index, false)
	if err != nil {
		return 0, gone(err)
	}
	var ours []rtnl.TCFilter
	var b rtnl.Batch
	for _, f := range filters {
		if f.Kind != "bpf" || !strings.HasPrefix(f.Name, mark.FilterPrefix) {
			continue
		}
		ours = append(ours, f)
		b.DeleteTCFilter("delete the filter "+f.Name, f)
	}
	removed = b.Len()
	if removed == 0 {
		return 0, nil
	}
	if len(ours) == len(filters) && !keep(ours) {
		out, err := conn.TCFilters(index, true)
		if err != nil {
			return 0, gone(err)
		}
		if len(out) == 0 {
			b.DeleteClsact("delete the qdisc clsact", index)
		}
	}
	var errs []error
	for _, err := range conn.Each(&b) {
		errs = append(errs, gone(err))
	}
	return removed, errors.Join(errs...)
}

// gone drops the errors of taking away what is not there, or of a device that is
// not.
func gone(err error) error {
	for _, e := range []unix.Errno{unix.ENOENT, unix.ENODEV, unix.EINVAL} {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
}
