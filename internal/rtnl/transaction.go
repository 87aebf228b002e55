package rtnl

import (
	"errors"

	"golang.org/x/sys/unix"
)

// The messages around a transaction, linux/netfilter/nfnetlink.h.
const (
	batchBegin = 0x10
	batchEnd   = 0x11
)

// Transaction delivers the messages of a batch to nftables, which carries out
// all of them or none. It is for sockets of family NETLINK_NETFILTER. The error
// names every message that the kernel refused.
func (c *Conn) Transaction(b *Batch) error {
	if b.Len() == 0 {
		return nil
	}
	// The resource is the subsystem, in network order.
	around := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	var whole Batch
	whole.Begin("begin a transaction", batchBegin, 0, around)
	whole.seal(0, 0, false)
	first := c.seq + 1
	for i := range b.starts {
		c.seq++
		b.seal(i, c.seq, i == len(b.starts)-1)
	}
	whole.buf = append(whole.buf, b.buf...)
	end := len(whole.buf)
	whole.Begin("end a transaction", batchEnd, 0, around)
	native.PutUint32(whole.buf[end:], uint32(len(whole.buf)-end))
	if err := c.write(whole.buf); err != nil {
		return err
	}
	var errs []error
	for done := false; !done; {
		err := c.receive(func(m Message) {
			i := int(m.Seq - first)
			// Without the right to change anything the whole is refused, in the name of
			// its begin.
			if m.Type == unix.NLMSG_ERROR && m.Seq == 0 {
				done = true
				errs = append(errs, m.refusal("nftables"))
				return
			}
			if m.Type != unix.NLMSG_ERROR || i < 0 || i >= len(b.starts) {
				return
			}
			done = done || i == len(b.starts)-1
			if err := m.refusal(b.steps[i]); err != nil {
				errs = append(errs, err)
			}
		})
		if err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}
