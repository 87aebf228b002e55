package nftables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/internal/mark"
)

// The flags of a table that only the socket which made it may change, and that
// stays when that socket is closed; linux/netfilter/nf_tables.h.
const (
	tableOwner   = 1 << 1
	tablePersist = 1 << 2
)

// owner holds the socket that owns a table.
type owner struct {
	conn *nftables.Conn // nil: closed
	raw  *netlink.Conn  // of conn: the library makes tables without flags only
}

// NewGuard is New for a table of its own that belongs to this process: others can
// neither change nor flush it (nft flush ruleset, nftables.service). When the
// process ends it stays, belongs to nobody, and the next process takes it over.
// Set says with IsUnsupported that the kernel cannot do that (before 6.9).
func NewGuard() *Firewall {
	return &Firewall{table: &nftables.Table{Name: mark.NFGuardTable, Family: nftables.TableFamilyINet}, owner: &owner{}}
}

// RemoveUnowned removes a table of the guard's name that belongs to nobody and cannot
// be owned: one of a saved ruleset, or of another kernel. What it lets in nobody
// changes. It returns how much there was.
func RemoveUnowned(ctx context.Context) (changed int, err error) {
	f := &Firewall{table: &nftables.Table{Name: mark.NFGuardTable, Family: nftables.TableFamilyINet}}
	return f.Remove(ctx)
}

// Close gives up a table that belongs to this process. It stays.
func (f *Firewall) Close() {
	if f.owner != nil && f.owner.conn != nil {
		f.owner.conn.CloseLasting()
		f.owner.conn = nil
	}
}

// errNoOwners: the kernel has no tables that belong to a process and stay.
var errNoOwners = errors.New("the kernel has no tables of nftables that belong to a process (it needs 6.9)")

// IsUnsupported reports whether an error says that the kernel has no tables that
// belong to a process.
func IsUnsupported(err error) bool { return errors.Is(err, errNoOwners) }

// connect opens a connection, or answers with the one that owns the table.
func (f *Firewall) connect() (*nftables.Conn, error) {
	if f.owner == nil {
		return connect()
	}
	if f.owner.conn != nil {
		return f.owner.conn, nil
	}
	c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		f.owner.raw = c
		return errors.Join(c.SetWriteBuffer(sendBuffer), c.SetReadBuffer(sendBuffer))
	}))
	if err != nil {
		return nil, err
	}
	f.owner.conn = c
	return c, nil
}

// lose gives the connection up after an error: answers may be left in it.
func (f *Firewall) lose(err error) {
	if err != nil {
		f.wanted = nil
		f.Close()
	}
}

// addTable makes the table where it is missing.
func (f *Firewall) addTable(c *nftables.Conn) error {
	if f.owner == nil {
		c.AddTable(f.table)
		return nil
	}
	header := func(family byte, resource uint16) []byte {
		return binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
	}
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(f.table.Name), 0)},
		{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, tableOwner|tablePersist)},
	})
	if err != nil {
		return err
	}
	if _, err := f.owner.raw.SendMessages([]netlink.Message{
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request}, Data: header(0, unix.NFNL_SUBSYS_NFTABLES)},
		{
			Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWTABLE, Flags: netlink.Request | netlink.Acknowledge | netlink.Create},
			Data:   append(header(unix.NFPROTO_INET, 0), attrs...),
		},
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request}, Data: header(0, unix.NFNL_SUBSYS_NFTABLES)},
	}); err != nil {
		return err
	}
	_, err = f.owner.raw.Receive()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return errNoOwners
	}
	if err != nil {
		return fmt.Errorf("own table inet %s: %w", f.table.Name, err)
	}
	return nil
}
