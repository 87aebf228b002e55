package doctor

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall/foreign"
	"overlayd.internal/overlay/internal/rtnl"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/overlayd/internal/audit"
)

// sound is a host of which nothing is wrong, with a root directory of its own.
func sound(t *testing.T) *host {
	t.Helper()
	lease := conf.Lease{Bridges: conf.Halves[:], Grants: []conf.Grant{{
		Overlay: conf.Overlay{Name: "dcos", Subnet: netip.MustParsePrefix("9.0.0.0/8"), Prefix: 24},
		Subnet:  netip.MustParsePrefix("9.0.1.0/24"),
	}}}
	state := conf.State{
		BootID: "b", IP: netip.MustParseAddr("172.17.0.4"), MTU: 1450, Version: "1", Overlays: lease.AgentOverlays(nil),
		Lease:       conf.LeaseState{Epoch: 3, ExpiresBoottime: int64(conf.Boottime() + time.Hour)},
		Directories: conf.Directories{State: t.TempDir(), CNIBin: []string{t.TempDir(), t.TempDir()}},
	}
	return &host{
		Options: Options{Root: t.TempDir(), Version: "1"}, ctx: t.Context(), state: state, dirs: state.Directories,
		books: audit.Host{Boot: "b", State: state}, links: map[string]rtnl.Link{},
	}
}

func (h *host) write(t *testing.T, path, content string) {
	t.Helper()
	path = h.path(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

func certificate(t *testing.T, from, until time.Time) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: from, NotAfter: until}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// peerAt is a host with a subnet of the overlay.
func peerAt(ip string) func(*testing.T, *host) {
	return func(_ *testing.T, h *host) {
		h.peers = append(h.peers, conf.Peer{AgentID: "p", AgentIP: netip.MustParseAddr(ip), Subnets: []netip.Prefix{netip.MustParsePrefix("9.0.2.0/24")}})
	}
}

// second is a host with a second agent IP, on a link or no longer, and a peer that is
// reached from there.
func second(there bool) func(*testing.T, *host) {
	return func(t *testing.T, h *host) {
		h.state.SecondIP = netip.MustParseAddr("fd00::3")
		if there {
			h.addresses = map[int][]netip.Prefix{2: {netip.MustParsePrefix("fd00::3/64")}}
		}
		peerAt("fd00::4")(t, h)
		h.peers[0].TwoFamilies = true
	}
}

// secondFiltered is second, where the policy of INPUT drops what comes by that family.
func secondFiltered(there bool) func(*testing.T, *host) {
	return func(t *testing.T, h *host) {
		second(there)(t, h)
		h.rules.Sets = append(h.rules.Sets, foreign.Parse("ip6tables-nft", "*filter\n:INPUT DROP [0:0]\n"))
	}
}

// Each fault is found by the check that is for it, and the same host without the
// fault is sound.
func TestChecks(t *testing.T) {
	hour := time.Hour
	rules := func(command, text string) func(*testing.T, *host) {
		return func(_ *testing.T, h *host) {
			h.rules.Sets = append(h.rules.Sets, foreign.Parse(command, text))
		}
	}
	for _, tt := range []struct {
		name     string
		check    func(*host) []Finding
		plant    func(*testing.T, *host)
		evidence string // part of it; empty: nothing is wrong
	}{
		{"earlier boot", checkAgent, func(_ *testing.T, h *host) { h.state.BootID = "a" }, "boot_id is a"},
		{"agent away", checkAgent, func(_ *testing.T, h *host) { h.running = errors.New("refused") }, "refused"},
		{"nothing published", checkAgent, func(_ *testing.T, h *host) { h.stateErr = os.ErrNotExist }, "no state.json"},
		{"state unreadable", checkAgent, func(_ *testing.T, h *host) { h.stateErr = errors.New("bad JSON") }, "bad JSON"},
		{"lease lost", checkLease, func(_ *testing.T, h *host) { h.state.Lease.Lost = "granted to another" }, "granted to another"},
		{"no lease", checkLease, func(_ *testing.T, h *host) { h.state.Lease = conf.LeaseState{} }, "did not answer"},
		{"lease over", checkLease, func(_ *testing.T, h *host) { h.state.Lease.ExpiresBoottime = 1 }, "did not answer"},
		{"lease not renewed", checkLease, func(_ *testing.T, h *host) { h.state.Lease.Error = "refused" }, "refused"},
		{"overlay failed", checkOverlays, func(_ *testing.T, h *host) {
			h.state.Overlays[0].State = &conf.OverlayStatus{Status: conf.StatusFailed, Error: "no VTEP"}
		}, "no VTEP"},
		{"half not nearly full", checkUse, use(80, 10, 125), ""},
		{"half nearly full", checkUse, use(90, 10, 125), "90 used, 10 cooling, 125 in all"},
		{"half full", checkUse, use(100, 25, 125), "100 used, 25 cooling, 125 in all"},

		{"a peer of the other family", checkFamilies, peerAt("fd00::4"), "agent IP 172.17.0.4 here, fd00::4 there"},
		{"a peer of the same family", checkFamilies, peerAt("172.17.0.5"), ""},
		{"a peer of the second family", checkFamilies, second(true), ""},
		{"a peer of the second family, whose agent IP has gone", checkFamilies, second(false), "agent IP 172.17.0.4 here, fd00::4 there"},
		{"a second agent IP that has gone, and its routes", checkRoutes, func(t *testing.T, h *host) {
			h.conn, h.links[conf.VTEPName] = open(t), rtnl.Link{Index: 1 << 20}
			h.state.Overlays[0].Backend.VXLAN.VTEPIP = netip.MustParsePrefix("44.128.0.2/20")
			second(false)(t, h)
			h.peers[0].VTEPIP = netip.MustParseAddr("44.128.0.3")
		}, ""},

		{"conntrack half full", checkConntrack, conntrack(50), ""},
		{"Docker's IPv6 full, with room elsewhere", checkUse, docker6(5, true), "fd01:b::8/125: 5 used, 0 cooling, 5 in all"},
		{"Docker's IPv6 not nearly full", checkUse, docker6(2, true), ""},
		{"IPv6 full, and Docker has none", checkUse, docker6(5, false), ""},
		{"conntrack nearly full", checkConntrack, conntrack(90), "nf_conntrack_count is 90"},
		{"few neighbours", checkNeighbourTable, func(t *testing.T, h *host) {
			h.write(t, "proc/sys/net/ipv4/neigh/default/gc_thresh3", "10\n")
			h.links["m-dcos"] = rtnl.Link{Index: 1000, Name: "m-dcos"}
			for i := range 9 {
				name := fmt.Sprint("port", i)
				h.links[name] = rtnl.Link{Index: 1001 + i, Name: name, Master: 1000}
			}
		}, "9 containers"},
		{"checksums", checkChecksums, func(t *testing.T, h *host) {
			h.write(t, "proc/self/net/snmp", "Udp: InDatagrams NoPorts InCsumErrors\nUdp: 10000 0 5000\n")
			h.conn = open(t)
		}, "InCsumErrors 5000 of 10000"},
		{"few wrong checksums", checkChecksums, func(t *testing.T, h *host) {
			h.write(t, "proc/self/net/snmp", "Udp: InDatagrams NoPorts InCsumErrors\nUdp: 10000 0 50\n")
		}, ""},

		{"NetworkManager", checkNetworkManager, func(t *testing.T, h *host) { h.write(t, "run/NetworkManager/NetworkManager.pid", "1") }, "it runs"},
		{"NetworkManager told", checkNetworkManager, func(t *testing.T, h *host) {
			h.write(t, "run/NetworkManager/NetworkManager.pid", "1")
			h.write(t, "etc/NetworkManager/conf.d/90-overlay.conf", "[keyfile]\nunmanaged-devices=interface-name:vtep1024;interface-name:m-*\n")
		}, ""},
		{"NetworkManager told in a comment", checkNetworkManager, func(t *testing.T, h *host) {
			h.write(t, "run/NetworkManager/NetworkManager.pid", "1")
			h.write(t, "etc/NetworkManager/conf.d/90-overlay.conf", "#unmanaged-devices=interface-name:vtep1024\n")
		}, "it runs"},
		{"NetworkManager told otherwise later", checkNetworkManager, func(t *testing.T, h *host) {
			h.write(t, "run/NetworkManager/NetworkManager.pid", "1")
			h.write(t, "usr/lib/NetworkManager/conf.d/10-overlay.conf", "[keyfile]\nunmanaged-devices+=interface-name:vtep1024*\n")
			h.write(t, "etc/NetworkManager/conf.d/calico.conf", "[keyfile]\nunmanaged-devices=interface-name:cali*\n")
		}, "calico.conf says something else"},
		{"NetworkManager told more later", checkNetworkManager, func(t *testing.T, h *host) {
			h.write(t, "run/NetworkManager/NetworkManager.pid", "1")
			h.write(t, "usr/lib/NetworkManager/conf.d/10-overlay.conf", "[keyfile]\nunmanaged-devices+=interface-name:vtep1024*\n")
			h.write(t, "etc/NetworkManager/conf.d/calico.conf", "[keyfile]\nunmanaged-devices+=interface-name:cali*\n")
		}, ""},
		{"NetworkManager told by a file that another replaces", checkNetworkManager, func(t *testing.T, h *host) {
			h.write(t, "run/NetworkManager/NetworkManager.pid", "1")
			h.write(t, "usr/lib/NetworkManager/conf.d/10-overlay.conf", "[keyfile]\nunmanaged-devices+=interface-name:vtep1024*\n")
			h.write(t, "etc/NetworkManager/conf.d/10-overlay.conf", "")
		}, "it runs"},
		{"networkd told", checkNetworkd, func(t *testing.T, h *host) {
			h.write(t, "run/systemd/netif/links/2", "")
			h.write(t, "usr/lib/systemd/network/10-overlay.network", "[Match]\nName=vtep1024* m-*\n")
			h.write(t, "etc/systemd/network/20-all.network", "[Match]\nName=*\n")
		}, ""},
		{"networkd told too late", checkNetworkd, func(t *testing.T, h *host) {
			h.write(t, "run/systemd/netif/links/2", "")
			h.write(t, "usr/lib/systemd/network/10-overlay.network", "[Match]\nName=vtep1024* m-*\n")
			h.write(t, "etc/systemd/network/05-all.network", "[Match]\nName=*\n")
		}, "05-all.network matches Name=*"},
		{"networkd", checkNetworkd, func(t *testing.T, h *host) {
			h.write(t, "run/systemd/netif/links/2", "")
			h.write(t, "etc/systemd/network/10-all.network", "[Match]\nName = *\n")
		}, "Name=*"},
		{"networkd for one card", checkNetworkd, func(t *testing.T, h *host) {
			h.write(t, "run/systemd/netif/links/2", "")
			h.write(t, "etc/systemd/network/10-all.network", "[Match]\nName=eth0\n")
		}, ""},

		{"two versions", checkPluginVersions, plugins("one", "two"), "d-overlay differ"},
		{"two copies", checkPluginVersions, plugins("one", "one"), ""},
		{"one replaced", checkPluginVersions, stamped("v1.2.34", "v1.2.33"), "d-overlay is v1.2.34"},
		{"all replaced", checkPluginVersions, stamped("v1.2.34", "v1.2.34"), ""},
		{"certificate", checkCertificates, pki(-10*hour, -hour), "good until"},
		{"certificate not renewed", checkCertificates, pki(-100*hour, 10*hour), "good until"},
		{"certificate of today", checkCertificates, pki(-hour, 100*hour), ""},
		{"short certificate of today", checkCertificates, pki(-hour, 3*hour), ""},

		{"one coordinator away", checkCoordinators, coordinators(Coordinator{URL: "http://a", Err: errors.New("refused")}, Coordinator{URL: "http://b"}), "refused"},
		{"coordinators there", checkCoordinators, coordinators(Coordinator{URL: "http://a"}), ""},
		{"clock", checkClock, coordinators(Coordinator{URL: "http://a", Ahead: -time.Minute}), "1m0s"},
		{"clock a little off", checkClock, coordinators(Coordinator{URL: "http://a", Ahead: 3 * time.Second}), ""},
		{"version", checkVersions, func(_ *testing.T, h *host) { h.Version = "2" }, "the agent is 1, this program is 2"},

		{"FORWARD drops", checkForwardPolicy, rules("iptables-nft", "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -j DOCKER-USER\n"), "policy of FORWARD"},
		{"FORWARD drops behind ours", checkForwardPolicy, rules("iptables-nft", "*filter\n:FORWARD DROP [0:0]\n-A FORWARD -j OVERLAY-FORWARD\n"), ""},
		{"a drop before ours", checkForwardPolicy, rules("iptables-nft", "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n-A FORWARD -j OVERLAY-FORWARD\n"), "stands before"},
		{"INPUT drops", checkInput, rules("iptables-nft", "*filter\n:INPUT DROP [0:0]\n"), "policy of INPUT is DROP"},
		{"INPUT drops all but ours", checkInput, rules("iptables-nft", "*filter\n:INPUT DROP [0:0]\n-A INPUT -p udp -m udp --dport 64000 -j ACCEPT\n"), ""},
		{"INPUT drops by the second family", checkInput, secondFiltered(true), "policy of INPUT is DROP"},
		{"INPUT drops by the second family, whose agent IP has gone", checkInput, secondFiltered(false), ""},
		{"ufw", checkUFW, rules("iptables-nft", "*filter\n:INPUT DROP [0:0]\n:ufw-user-input - [0:0]\n"), "ufw is active"},
		{"ufw allows", checkUFW, rules("iptables-nft", "*filter\n:ufw-user-input - [0:0]\n-A ufw-user-input -p udp -m udp --dport 64000 -j ACCEPT\n"), ""},
		{"Docker 28", checkDocker, rules("iptables-nft", "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 9.0.1.130/32 ! -i d-dcos -j DROP\n"), "raw PREROUTING"},
		{"Docker 28 elsewhere", checkDocker, rules("iptables-nft", "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 172.18.0.2/32 ! -i br-x -j DROP\n"), ""},
		{"both flavours", checkFlavours, func(t *testing.T, h *host) {
			rules("iptables-nft", "*filter\n-A FORWARD -j OVERLAY-FORWARD\n")(t, h)
			rules("iptables-legacy", "*nat\n-A POSTROUTING -j MASQUERADE\n")(t, h)
		}, "1 rules of iptables-nft, 1 of iptables-legacy"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := sound(t)
			if found := tt.check(h); len(found) > 0 {
				t.Fatalf("a sound host: %+v", found)
			}
			tt.plant(t, h)
			found := tt.check(h)
			if (tt.evidence == "") != (len(found) == 0) || len(found) > 0 && !strings.Contains(found[0].Evidence, tt.evidence) {
				t.Errorf("found %+v, want evidence %q", found, tt.evidence)
			}
			for _, f := range found {
				if f.What == "" || f.Fix == "" || f.Severity == "" {
					t.Errorf("lacks something: %+v", f)
				}
				program, _, _ := strings.Cut(f.Fix, " ")
				if _, err := exec.LookPath(program); err != nil {
					continue // a sentence
				}
				if out, err := exec.Command("sh", "-nc", f.Fix).CombinedOutput(); err != nil {
					t.Errorf("%s is no command: %s", f.Fix, out)
				}
			}
		})
	}
}

func open(t *testing.T) *rtnl.Conn {
	t.Helper()
	c, err := rtnl.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func use(used, cooling, total uint64) func(*testing.T, *host) {
	return func(_ *testing.T, h *host) {
		h.books.Stores = map[string]audit.Store{"dcos": {Usage: []audit.Usage{{
			Overlay: "dcos", Half: conf.Mesos, Stats: ipam.Stats{Range: netip.MustParsePrefix("9.0.1.0/25"), Used: used, Cooling: cooling, Total: total},
		}}}}
	}
}

// docker6 is a host whose first subnet has so many IPv6 addresses for Docker in use, and
// that has a further one.
func docker6(used uint64, byDocker bool) func(*testing.T, *host) {
	return func(_ *testing.T, h *host) {
		p := netip.MustParsePrefix
		lease := conf.Lease{Bridges: conf.Halves[:], Grants: []conf.Grant{{
			Overlay: conf.Overlay{Name: "six"}, Subnet6: p("fd01:b::/124"), Blocks: []conf.Block{{Subnet6: p("fd01:b::10/124")}},
		}}}
		h.state.Overlays = lease.AgentOverlays(nil)
		rec := ipam.Record{Attachment: conf.Attachment{Network: "n", ContainerID: "c", IfName: "i"}, Half: conf.Docker, Addrs: []netip.Addr{netip.MustParseAddr("fd01:b::a")}}
		if byDocker {
			rec.Attachment = conf.DockerAttachment("six", rec.Addrs[0])
		}
		h.books.State = h.state
		h.books.Stores = map[string]audit.Store{"six": {Records: []ipam.Record{rec}, Usage: []audit.Usage{
			{Overlay: "six", Half: conf.Docker, Stats: ipam.Stats{Range: p("fd01:b::8/125"), Used: used, Total: 5}},
			{Overlay: "six", Half: conf.Docker, Stats: ipam.Stats{Range: p("fd01:b::18/125"), Total: 5}},
		}}}
	}
}

func conntrack(count int) func(*testing.T, *host) {
	return func(t *testing.T, h *host) {
		h.write(t, "proc/sys/net/netfilter/nf_conntrack_count", fmt.Sprintln(count))
		h.write(t, "proc/sys/net/netfilter/nf_conntrack_max", "100\n")
	}
}

func plugins(contents ...string) func(*testing.T, *host) {
	return func(t *testing.T, h *host) {
		for i, c := range contents {
			if err := os.WriteFile(filepath.Join(h.dirs.CNIBin[i], "d-overlay"), []byte(c), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// An agent of the build of 2026-11-23 does not say where plugins are.
func TestPluginsWhereNobodyKnows(t *testing.T) {
	h := sound(t)
	if got := checkPlugins(h); len(got) != 1 {
		t.Errorf("d-overlay is missing: %v", got)
	}
	h.dirs = conf.Directories{}
	if got := checkPlugins(h); len(got) != 0 {
		t.Errorf("where they are nobody says: %v", got)
	}
}

// stamped installs d-overlay and overlay-ipam of these versions, in one directory.
func stamped(versions ...string) func(*testing.T, *host) {
	return func(t *testing.T, h *host) {
		const stamp = "mod\toverlayd.internal/overlay\t"
		self, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		for n, name := range []string{"d-overlay", "overlay-ipam"} {
			program := bytes.ReplaceAll(self, []byte(stamp+"(devel)"), []byte(stamp+versions[n]))
			if err := os.WriteFile(filepath.Join(h.dirs.CNIBin[0], name), program, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func pki(from, until time.Duration) func(*testing.T, *host) {
	return func(t *testing.T, h *host) {
		dir := filepath.Join(h.dirs.State, "pki")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "agent.pem"), certificate(t, time.Now().Add(from), time.Now().Add(until)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func coordinators(cs ...Coordinator) func(*testing.T, *host) {
	return func(_ *testing.T, h *host) { h.coordinators = cs }
}

// The VXLAN port in the hands of a program.
func TestPortTaken(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	h := sound(t)
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if found := checkPort(h); len(found) > 0 {
				return fmt.Errorf("free: %+v", found)
			}
			c, err := net.ListenUDP("udp4", &net.UDPAddr{Port: conf.VXLANPort})
			if err != nil {
				return err
			}
			defer c.Close()
			if found := checkPort(h); len(found) != 1 {
				return fmt.Errorf("taken: %+v", found)
			}
			return nil
		}()
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A peer is looked for at a VTEP address of a family that this host has one of as well.
func TestNeighboursOfSharedFamilies(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	mac := conf.MAC{0x70, 0xb3, 0xd5, 0x80, 0, 3}
	four, six := conf.VXLAN{VTEPIP: p("44.128.0.2/20")}, conf.VXLAN{VTEPIP6: p("fd01:a::2/64")}
	look := func(own conf.VXLAN, vtep, vtep6 netip.Addr, entries ...string) (found []Finding) {
		done := make(chan error)
		h := sound(t)
		h.state.Overlays[0].Backend.VXLAN = own
		h.peers = []conf.Peer{{AgentID: "p", AgentIP: a("172.17.0.5"), VTEPIP: vtep, VTEPIP6: vtep6, VTEPMAC: mac, Subnets: []netip.Prefix{p("9.0.2.0/24")}}}
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with its namespace
			done <- func() error {
				if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
					return err
				}
				commands := []string{"ip link add vtep1024 up type vxlan id 1024 dstport 64000 local 172.17.0.4 nolearning",
					"bridge fdb append " + mac.String() + " dev vtep1024 dst 172.17.0.5"}
				for _, e := range entries {
					commands = append(commands, "ip neighbour add "+e+" lladdr "+mac.String()+" dev vtep1024")
				}
				for _, c := range commands {
					if out, err := exec.Command("sh", "-c", c).CombinedOutput(); err != nil {
						return fmt.Errorf("%s: %w: %s", c, err, out)
					}
				}
				var err error
				if h.conn, err = rtnl.Open(); err != nil {
					return err
				}
				defer h.conn.Close()
				l, _, err := h.conn.LinkByName(conf.VTEPName)
				h.links[conf.VTEPName] = l
				found = checkNeighbours(h)
				return err
			}()
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		return found
	}
	theirs, theirs6, none := a("44.128.0.3"), a("fd01:a::3"), netip.Addr{}
	for name, found := range map[string][]Finding{
		"IPv6 alone here":  look(six, theirs, theirs6, "fd01:a::3"),
		"IPv4 alone here":  look(four, theirs, theirs6, "44.128.0.3"),
		"IPv6 alone there": look(conf.VXLAN{VTEPIP: four.VTEPIP, VTEPIP6: six.VTEPIP6}, none, theirs6, "fd01:a::3"),
		"none in common":   look(four, none, theirs6),
	} {
		if len(found) > 0 {
			t.Errorf("%s: %+v", name, found)
		}
	}
	for lacks, found := range map[string][]Finding{"fd01:a::3": look(six, theirs, theirs6, "44.128.0.3"), "44.128.0.3": look(four, theirs, theirs6, "fd01:a::3")} {
		if len(found) != 1 || !strings.Contains(found[0].Evidence, "ip neighbour show "+lacks+" ") {
			t.Errorf("without an entry for %s: %+v", lacks, found)
		}
	}
}

// Every check has a name of its own, which people find in the pages.
func TestNames(t *testing.T) {
	page, err := os.ReadFile("../../../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, n := range Names() {
		if seen[n] {
			t.Errorf("two checks are called %s", n)
		}
		seen[n] = true
		if !strings.Contains(string(page), "\n| `"+n+"` |") {
			t.Errorf("docs/operations.md lacks the check %s", n)
		}
	}
	if len(seen) < 20 {
		t.Errorf("%d checks", len(seen))
	}
}

// What doctor has people write for network managers is what the packages bring, and no
// more: not the devices of others, nor in place of what they have set.
func TestFixesOfManagers(t *testing.T) {
	h := sound(t)
	h.write(t, "run/NetworkManager/NetworkManager.pid", "1")
	h.write(t, "run/systemd/netif/links/2", "")
	h.write(t, "etc/systemd/network/00-all.network", "[Match]\nName=*\n")
	h.write(t, "etc/NetworkManager/conf.d/calico.conf", "[keyfile]\nunmanaged-devices=interface-name:cali*\n")
	for file, check := range map[string]func(*host) []Finding{"networkmanager.conf": checkNetworkManager, "overlay.network": checkNetworkd} {
		packaged, err := os.ReadFile("../../../../conf/packages/files/" + file)
		if err != nil {
			t.Fatal(err)
		}
		found := check(h)
		if len(found) != 1 {
			t.Fatalf("found %v, want one", found)
		}
		write, _, _ := strings.Cut(found[0].Fix, " > ")
		written, err := exec.Command("sh", "-ec", write).Output()
		if err != nil {
			t.Fatalf("%s: %v", write, err)
		}
		if got, want := settings(written), settings(packaged); got != want {
			t.Errorf("doctor has people write\n%s\nwant\n%s", got, want)
		}
		h.write(t, strings.Fields(found[0].Fix[len(write):])[1], string(written))
		if found := check(h); len(found) > 0 {
			t.Errorf("that does not cure it: %v", found)
		}
	}
}

// settings are the lines of a file that are no comments.
func settings(file []byte) (out string) {
	for line := range strings.Lines(string(file)) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			out += line + "\n"
		}
	}
	return out
}

// A host that is made to forward IPv6 goes on listening to routers where it did, and
// does not begin to listen to containers.
func TestForwardingKeepsRouters(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	h := sound(t)
	h.Root = ""
	h.state.Overlays[0].Subnet6 = netip.MustParsePrefix("fd01:b::/80")
	name := fmt.Sprintf("ovo-%d-routers", os.Getpid())
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		t.Fatalf("make a network namespace: %v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	err := ns.WithNetNSPath("/run/netns/"+name, func(ns.NetNS) error {
		out, err := exec.Command("sh", "-ec", `
for l in eth0 d-dcos; do
	ip link add $l type bridge
	echo 1 > /proc/sys/net/ipv6/conf/$l/accept_ra
done
echo 0 > /proc/sys/net/ipv6/conf/all/forwarding`).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if h.conn, err = rtnl.Open(); err != nil {
			return err
		}
		defer h.conn.Close()
		h.addresses = map[int][]netip.Prefix{}
		if err := h.readLinks(); err != nil {
			return err
		}
		for _, f := range checkForwarding(h) {
			if err := f.Repair(t.Context()); err != nil {
				return err
			}
		}
		for key, want := range map[string]int{"all/forwarding": 1, "eth0/accept_ra": 2, "d-dcos/accept_ra": 1} {
			if got, ok := h.sysctlNumber("net/ipv6/conf/" + key); !ok || got != want {
				t.Errorf("net/ipv6/conf/%s is %d, want %d", key, got, want)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A damaged file of peers is found, with all else that is wrong.
func TestDamagedPeers(t *testing.T) {
	run, state := t.TempDir(), sound(t).state
	if err := conf.WriteJSON(filepath.Join(run, conf.StateFile), state, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(state.Directories.State, audit.PeersFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	found, err := Look(t.Context(), Options{RunDir: run})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, f := range found {
		seen[f.Check] = true
		if f.Check == "drift" && !strings.Contains(f.What, "stored peers") {
			t.Errorf("found %v", f)
		}
	}
	if !seen["drift"] || !seen["agent"] {
		t.Errorf("found %v, want the agent and the peers among them", found)
	}
}

// Who may not ask the agent is not told that it does not run.
func TestAgentOfOthers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: asks as another user")
	}
	path := filepath.Join(t.TempDir(), conf.SocketFile)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	h := sound(t)
	h.state.Lease.Error = ""
	runtime.LockOSThread() // the thread is another user's
	unix.Setfsuid(65534)
	h.running = dial(t.Context(), path)
	unix.Setfsuid(0)
	runtime.UnlockOSThread()
	for _, h.stateErr = range []error{nil, fs.ErrNotExist} {
		found := checkAgent(h)
		if len(found) != 1 || strings.Contains(found[0].What, "no agent runs") || strings.Contains(found[0].What, "does not run") || strings.Contains(found[0].Fix, "systemctl") {
			t.Errorf("found %v", found)
		}
	}
}
