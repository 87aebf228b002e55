package explain

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/overlayd/internal/audit"
)

// Where an address store cannot be read, nobody says that a container is not there.
func TestUnreadableStore(t *testing.T) {
	runDir := t.TempDir()
	path := filepath.Join(runDir, conf.IPAMDir, "dcos.db")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("damaged", 5000)), 0o600); err != nil {
		t.Fatal(err)
	}
	books, err := audit.Read(t.Context(), runDir)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := rtnl.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	p := netip.MustParsePrefix
	lease := conf.Lease{Bridges: conf.Halves[:], Grants: []conf.Grant{
		{Overlay: conf.Overlay{Name: "dcos", Subnet: p("9.0.0.0/8"), Prefix: 24}, Subnet: p("9.0.1.0/24")},
		{Overlay: conf.Overlay{Name: "sound", Subnet: p("10.0.0.0/8"), Prefix: 24}, Subnet: p("10.0.1.0/24")},
	}}
	books.State.Overlays = lease.AgentOverlays(nil)
	const words = "the address store of overlay dcos cannot be read; see overlayctl ipam check"
	for addr, want := range map[string]bool{"9.0.1.130": true, "10.0.1.130": false} {
		for name, step := range map[string]func(*walk) bool{"source": (*walk).source, "destination": (*walk).destination, "holder": (*walk).holder} {
			w := &walk{ctx: t.Context(), conn: conn, books: books}
			w.a = w.at(addr, netip.MustParseAddr(addr))
			w.b = w.a
			if step(w) || strings.Contains(w.result.StopsAt, words) != want {
				t.Errorf("%s of %s: stops at %q", name, addr, w.result.StopsAt)
			}
		}
	}
	if _, err := (&walk{books: books}).ends("web"); err == nil || !strings.Contains(err.Error(), words) {
		t.Errorf("a name: %v", err)
	}
}
