package audit

import (
	"errors"
	"io/fs"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
	"overlayd.internal/overlay/internal/netns"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/internal/veth"
	"overlayd.internal/overlay/ipam"
)

var (
	att   = conf.Attachment{Network: "dcos", ContainerID: "c1", IfName: "eth0"}
	addr  = netip.MustParseAddr("9.0.1.2")
	other = netip.MustParseAddr("9.0.1.3")
)

// sound is a host on which one container is attached and all is well.
func sound() Host {
	lease := conf.Lease{Bridges: conf.Halves[:], Grants: []conf.Grant{{
		Overlay: conf.Overlay{Name: "dcos", Subnet: netip.MustParsePrefix("9.0.0.0/8"), Prefix: 24},
		Subnet:  netip.MustParsePrefix("9.0.1.0/24"),
	}}}
	return Host{
		Boot:  "b",
		State: conf.State{BootID: "b", MTU: 1450, Overlays: lease.AgentOverlays(nil)},
		Stores: map[string]Store{"dcos": {
			Records: []ipam.Record{{Attachment: att, Half: conf.Mesos, Addrs: []netip.Addr{addr}, BootID: "b"}},
		}},
		Links: []veth.Link{link("m-dcos", 11, att, addr)},
	}
}

func link(bridge string, master int, a conf.Attachment, addrs ...netip.Addr) veth.Link {
	half := conf.Mesos
	if bridge[0] == 'd' {
		half = conf.Docker
	}
	return veth.Link{Name: mark.HostEnd(half, a.Key()), Master: master, Alias: mark.NewAlias(bridge[2:], half, a, addrs, 0)}
}

// dockers adds addresses that Docker has.
func dockers(h *Host, addrs ...string) {
	s := h.Stores["dcos"]
	for _, text := range addrs {
		a := netip.MustParseAddr(text)
		s.Records = append(s.Records, ipam.Record{Attachment: conf.DockerAttachment("dcos", a), Half: conf.Docker, Addrs: []netip.Addr{a}, BootID: "b"})
	}
	h.Stores["dcos"] = s
}

// TestCompare damages a sound host in one way at a time.
func TestCompare(t *testing.T) {
	vm := mark.HostEnd(conf.Mesos, att.Key())
	record := func(f func(*ipam.Record)) func(*Host) {
		return func(h *Host) { f(&h.Stores["dcos"].Records[0]) }
	}
	tests := []struct {
		name   string
		damage func(*Host)
		want   []string // how each difference begins
	}{
		{"sound", func(*Host) {}, nil},
		{"nothing at all", func(h *Host) { *h = Host{StateErr: fs.ErrNotExist} }, nil},
		{"not published", func(h *Host) { h.State, h.StateErr = conf.State{}, fs.ErrNotExist }, []string{"containers are or were attached, and the agent has published nothing"}},
		{"unreadable", func(h *Host) { h.State, h.StateErr = conf.State{}, errors.New("not JSON") }, []string{"the published state cannot be read: not JSON"}},
		{"earlier boot", func(h *Host) { h.State.BootID = "a" }, []string{"the published state is of an earlier boot"}},
		{"store unreadable", func(h *Host) { h.Stores["dcos"] = Store{Err: ipam.ErrDamaged} }, []string{"overlay dcos: the address store cannot be read: address store is damaged"}},
		{"store not in order", func(h *Host) { h.Stores["dcos"] = Store{Problems: []string{"x", "y"}} },
			[]string{"overlay dcos: the address store is not in order: x;", "overlay dcos: the address store is not in order: y;"}},
		{"interface gone", func(h *Host) { h.Links = nil }, []string{"overlay dcos: dcos/c1/eth0 has [9.0.1.2] in the address store and no interface " + vm + ";"}},
		{"another's interface", func(h *Host) {
			h.Links = nil
			h.Stores["dcos"].Records[0].NetNS = netns.Ref{Path: "/run/netns/x", Inode: 1}
		}, nil},
		{"another's interface, namespace gone", func(h *Host) {
			h.Links = nil
			s := h.Stores["dcos"]
			s.Records[0].NetNS = netns.Ref{Path: "/run/netns/x", Inode: 1}
			s.Gone = map[conf.Key]bool{att.Key(): true}
			h.Stores["dcos"] = s
		}, []string{"overlay dcos: dcos/c1/eth0 has [9.0.1.2] in the address store, and its network namespace /run/netns/x is gone;"}},
		{"record gone", func(h *Host) { h.Stores["dcos"] = Store{} }, []string{"overlay dcos: interface " + vm + " of dcos/c1/eth0 has [9.0.1.2], and the address store does not know it;"}},
		{"store gone", func(h *Host) { h.Stores = nil }, []string{"overlay dcos: interface " + vm + " of dcos/c1/eth0 has [9.0.1.2], and the address store does not know it;"}},
		{"other address", record(func(r *ipam.Record) { r.Addrs = []netip.Addr{other} }), []string{"overlay dcos: dcos/c1/eth0 has [9.0.1.3] of the mesos half in the address store, and its interface " + vm + " has [9.0.1.2] of the mesos half;"}},
		{"gateway's address", func(h *Host) {
			gw := []netip.Addr{netip.MustParseAddr("9.0.1.1")}
			h.Stores["dcos"].Records[0].Addrs, h.Links[0].Addrs = gw, gw
		}, []string{"overlay dcos: dcos/c1/eth0 has 9.0.1.1, which is not among the addresses leased to the mesos half here [9.0.1.0/25];"}},
		{"other half's address", func(h *Host) {
			a := []netip.Addr{netip.MustParseAddr("9.0.1.130")}
			h.Stores["dcos"].Records[0].Addrs, h.Links[0].Addrs = a, a
		}, []string{"overlay dcos: dcos/c1/eth0 has 9.0.1.130, which is not among"}},
		{"overlay no longer leased", func(h *Host) { h.State.Overlays = nil }, []string{"overlay dcos: dcos/c1/eth0 has 9.0.1.2, which is not among the addresses leased to the mesos half here []"}},
		{"Docker's", func(h *Host) { dockers(h, "9.0.1.130", "169.254.16.2") }, nil},
		{"Docker's of the other half", func(h *Host) { dockers(h, "9.0.1.3") }, []string{"overlay dcos: a container of Docker has 9.0.1.3, which is not among the addresses leased to the docker half here [9.0.1.128/25];"}},
		{"two with one address", func(h *Host) {
			b := att
			b.ContainerID = "c2"
			h.Stores["dcos"] = Store{Records: append(h.Stores["dcos"].Records, ipam.Record{Attachment: b, Half: conf.Mesos, Addrs: []netip.Addr{addr}})}
			h.Links = append(h.Links, link("m-dcos", 11, b, addr))
		}, []string{"overlay dcos: interfaces " + vm + " and vm"}},
		{"unmarked link", func(h *Host) { h.Unmarked = []string{"vm0123456789ab"} }, []string{"interface vm0123456789ab has the name of a container's and no alias"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := sound()
			tt.damage(&h)
			var got []string
			for i, d := range Compare(h) {
				text := d.String()
				if i < len(tt.want) && strings.HasPrefix(text, tt.want[i]) {
					text = tt.want[i]
				}
				got = append(got, text)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("differences (-want +got):\n%s", diff)
			}
		})
	}
}

// TestAbandoned: the differences that the agent takes away by itself.
func TestAbandoned(t *testing.T) {
	ids := func(h Host) (out []string) {
		for _, rec := range h.Abandoned("dcos") {
			out = append(out, rec.ContainerID)
		}
		return out
	}
	h := sound()
	add := func(id string, netns netns.Ref, gone bool) {
		s := h.Stores["dcos"]
		rec := ipam.Record{Attachment: att, Half: conf.Mesos, Addrs: []netip.Addr{other}, NetNS: netns}
		rec.ContainerID = id
		s.Records = append(s.Records, rec)
		if s.Gone == nil {
			s.Gone = map[conf.Key]bool{}
		}
		s.Gone[rec.Key()] = gone
		h.Stores["dcos"] = s
	}
	add("no-link", netns.Ref{}, false)
	add("living", netns.Ref{Path: "/run/netns/l", Inode: 1}, false)
	add("dead", netns.Ref{Path: "/run/netns/d", Inode: 2}, true)
	s := h.Stores["dcos"]
	s.Records = append(s.Records, ipam.Record{Attachment: conf.DockerAttachment("dcos", other), Half: conf.Docker, Addrs: []netip.Addr{other}})
	h.Stores["dcos"] = s
	if diff := cmp.Diff([]string{"no-link", "dead"}, ids(h)); diff != "" {
		t.Errorf("abandoned (-want +got):\n%s", diff)
	}
	h.Links = nil
	if diff := cmp.Diff([]string{"c1", "no-link", "dead"}, ids(h)); diff != "" {
		t.Errorf("without its interface (-want +got):\n%s", diff)
	}
}

// A container whose interface others have renamed, or given another alias, is there and
// keeps its addresses: only what a killed ADD left in between has no use for them.
func TestAltered(t *testing.T) {
	vm, alias := mark.HostEnd(conf.Mesos, att.Key()), link("m-dcos", 11, att, addr).String()
	const up, carrier = unix.IFF_UP, unix.IFF_LOWER_UP
	for _, tt := range []struct {
		name string
		link rtnl.Link
		want string // of what is said of the container; empty: it counts as gone
	}{
		{"renamed", rtnl.Link{Name: "uplink7", Kind: "veth", Alias: alias, Flags: up | carrier}, "its interface " + vm + " is called uplink7"},
		{"renamed and down", rtnl.Link{Name: "uplink7", Kind: "veth", Alias: alias}, "its interface " + vm + " is called uplink7"},
		{"another alias", rtnl.Link{Name: vm, Kind: "veth", Alias: "port 7", Flags: up | carrier}, "its interface " + vm + " has lost the alias"},
		{"another alias and down", rtnl.Link{Name: vm, Kind: "veth", Alias: "port 7"}, "its interface " + vm + " has lost the alias"},
		{"without alias", rtnl.Link{Name: vm, Kind: "veth", Flags: up | carrier}, "its interface " + vm + " has lost the alias"},
		{"of a killed ADD", rtnl.Link{Name: vm, Kind: "veth", Flags: up}, ""},
		{"of no container", rtnl.Link{Name: vm, Kind: "dummy", Alias: "port 7", Flags: up | carrier}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := sound()
			h.take([]rtnl.Link{tt.link})
			var said []string
			for _, d := range Compare(h) {
				if strings.Contains(d.Text, att.String()+" has") {
					said = append(said, d.Text)
				}
			}
			gone := len(h.Abandoned("dcos")) > 0
			if want := tt.want; len(said) != 1 || gone != (want == "") || !strings.Contains(said[0], want) || gone != strings.Contains(said[0], "no interface") {
				t.Errorf("gone: %v, said: %q", gone, said)
			}
		})
	}
}
