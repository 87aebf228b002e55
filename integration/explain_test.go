package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

type explanation struct {
	Host      string
	Reachable bool
	StopsAt   string `json:"stops_at"`
	Steps     []struct{ Name, Text string }

	Far        *explanation
	FarUnknown string `json:"far_unknown"`
}

// seenFar reports whether the host of B was asked, and has nothing to say against it.
func (e explanation) seenFar(host string) bool {
	return e.Far != nil && e.FarUnknown == "" && e.Far.Host == host && e.Far.Reachable && len(e.Far.Steps) >= 5
}

// explain runs overlayctl explain on a host and checks that its exit code fits.
func explain(t *testing.T, h *lab.Host, a, b string) (e explanation) {
	t.Helper()
	cmd := h.Command(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "explain", a, b, "-o", "json", "--run-dir", h.RunDir)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if jerr := json.Unmarshal(out, &e); jerr != nil {
		t.Fatalf("overlayctl explain %s %s: %v, %v\n%s%s", a, b, err, jerr, out, stderr.String())
	}
	if (err == nil) != e.Reachable || e.Reachable != (e.StopsAt == "") || len(e.Steps) == 0 {
		t.Errorf("overlayctl explain %s %s: %v, %+v", a, b, err, e)
	}
	return e
}

// idOf waits until the coordinator knows a container, and returns its id.
func idOf(t *testing.T, h *lab.Host, c *lab.Container) (id string) {
	t.Helper()
	must(t, lab.Wait(t.Context(), "the coordinator to know "+c.Addr().String(), 30*time.Second, func() error {
		out, err := h.Run(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "containers", "--all", "-o", "json", "--run-dir", h.RunDir)
		var list struct {
			Containers []struct {
				ID        string
				Addresses []netip.Addr
			}
		}
		if err := errors.Join(err, json.Unmarshal([]byte(out), &list)); err != nil {
			return err
		}
		for _, found := range list.Containers {
			if slices.Contains(found.Addresses, c.Addr()) {
				id = found.ID
				return nil
			}
		}
		return errors.New(out)
	}))
	return id
}

// explainFromAfar: the host of A walks, whichever host it is asked on, and says what is
// wrong there; containers are named by address, id or the beginning of one.
func explainFromAfar(t *testing.T, h *lab.Host, a, far, far6, small *lab.Container) {
	t.Helper()
	e := explain(t, h, far.Addr().String(), a.Addr().String())
	if !e.Reachable || e.Host != "172.17.0.3" {
		t.Errorf("from a container of another host: %+v", e)
	}
	aID, farID, far6ID := idOf(t, h, a), idOf(t, h, far), idOf(t, h, far6)
	for _, ends := range [][2]string{{farID, aID}, {farID[:len(farID)-1], a.Addr().String()}, {far.Addr().String(), "172.17.0.200"}} {
		if e := explain(t, h, ends[0], ends[1]); !e.Reachable || e.Host != "172.17.0.3" {
			t.Errorf("%v: %+v", ends, e)
		}
	}
	if e := explain(t, h, aID, farID); !e.Reachable || e.Host != "172.17.0.4" {
		t.Errorf("from here to a container that is named by id: %+v", e)
	}
	if e := explain(t, h, idOf(t, h, small), aID); !strings.Contains(e.StopsAt, "isolation: overlay dcos does not let in what comes from overlay small") || e.Host != "172.17.0.3" {
		t.Errorf("isolation on the other host: %+v", e)
	}
	for _, ends := range [][2]string{{far6ID, aID}, {"nonsense", aID}} {
		if out, err := h.Run(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "explain", ends[0], ends[1], "--run-dir", h.RunDir); err == nil {
			t.Errorf("%v: %s", ends, out)
		}
	}
}

// explainFar: what is wrong on the host of B is named in its words, also where a probe of
// the host of A passes, and that it could not be asked is said.
func explainFar(t *testing.T, s *lab.Seed, from string, far *lab.Container) {
	t.Helper()
	h, peer, to := s.Agents[0], s.Agents[1], far.Addr().String()
	// What is not the agent's it does not take away.
	script(t, peer, "nft add table inet stranger; nft 'add chain inet stranger f { type filter hook forward priority 10; policy drop; }'")
	e := explain(t, h, from, to)
	if !strings.HasPrefix(e.StopsAt, "on host 172.17.0.3, firewall: ") || e.Far == nil || e.Far.StopsAt == "" {
		t.Errorf("the firewall of the other host: %+v", e)
	}
	script(t, peer, "nft delete table inet stranger")

	must(t, peer.Proc.Stop())
	script(t, peer, "ip link set d-dcos down")
	if e := explain(t, h, from, to); !strings.Contains(e.StopsAt, "the container does not answer") || e.Far != nil || !strings.Contains(e.FarUnknown, "not connected") {
		t.Errorf("its agent is away: %+v", e)
	}
	must(t, s.StartAgent(peer))
	must(t, peer.WaitReady(t.Context()))
	must(t, s.WaitMesh(t.Context()))
	wait(t, "all to be well again", 60*time.Second, func() error {
		if e := explain(t, h, from, to); !e.Reachable || !e.seenFar("172.17.0.3") {
			return fmt.Errorf("%+v", e)
		}
		return nil
	})
}

// TestExplain: ways that are open, and the culprit of ten that are broken.
func TestExplain(t *testing.T) {
	t.Parallel()
	s := newSeed(t, doctorConfig+"  - {name: open, subnet: 10.78.0.0/16, prefix: 24, allow: [dcos]}\n")
	must(t, s.Up(t.Context()))
	h, peer := s.Agents[0], s.Agents[1]
	a := place(t, s, 0, "a", "dcos", lab.Mesos)
	near := place(t, s, 0, "b", "dcos", lab.Docker)
	far := place(t, s, 1, "c", "dcos", lab.Docker)
	far6 := place(t, s, 1, "d", "dcos6", lab.Docker)
	near6 := place(t, s, 0, "e", "dcos6", lab.Mesos)
	small := place(t, s, 1, "f", "small", lab.Docker)
	open := place(t, s, 1, "g", "open", lab.Docker)
	from := a.Addr().String()

	for _, to := range []string{near.Addr().String(), "172.17.0.200"} {
		if e := explain(t, h, from, to); !e.Reachable || e.Far != nil || e.FarUnknown != "" {
			t.Errorf("%s to %s: %+v", from, to, e)
		}
	}
	for _, to := range []string{far.Addr().String(), open.Addr().String()} {
		if e := explain(t, h, from, to); !e.Reachable || !e.seenFar("172.17.0.3") {
			t.Errorf("%s to %s: %+v", from, to, e)
		}
	}
	if e := explain(t, h, near6.Addr().String(), far6.Addr().String()); !e.Reachable || !e.seenFar("172.17.0.3") {
		t.Errorf("IPv6: %+v", e)
	}
	out, err := h.Run(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "explain", from, "nonsense", "--run-dir", h.RunDir)
	if err == nil {
		t.Errorf("a name that nobody has: %s", out)
	}

	stops := func(name, to, want, plant, cure string) {
		t.Helper()
		if plant != "" {
			script(t, h, plant)
		}
		if e := explain(t, h, from, to); !strings.Contains(e.StopsAt, want) {
			t.Errorf("%s: stops at %q, want %q; %+v", name, e.StopsAt, want, e.Steps)
		}
		if cure != "" {
			script(t, h, cure)
		}
	}
	stops("isolation", small.Addr().String(), "isolation: overlay small", "", "")
	stops("nobody has a lease", "9.77.0.2", "no other host has a lease", "", "")
	explainFromAfar(t, h, a, far, far6, small)
	explainFar(t, s, from, far)

	// What the agent would repair.
	must(t, h.Proc.Stop())
	far4 := far.Addr().String()
	other, err := peer.Published()
	must(t, err)
	subnet := other.Overlays[0].Subnet.String()
	stops("bridge down", far4, "bridge m-dcos", "ip link set m-dcos down", "ip link set m-dcos up")
	stops("forwarding", far4, "forwarding", "sysctl -q -w net.ipv4.ip_forward=0", "sysctl -q -w net.ipv4.ip_forward=1")
	stops("VTEP MTU", far4, "VTEP", "ip link set vtep1024 mtu 1400", "ip link set vtep1024 mtu 1450")
	stops("foreign route", far4, "a route that is not ours", "ip route add "+far4+"/32 via 172.17.0.2", "ip route del "+far4+"/32 via 172.17.0.2")
	stops("underlay", far4, "underlay", "ip link set eth0 down", "ip link set eth0 up")
	stops("firewall", far4, "firewall", "iptables -w -I FORWARD -j DROP", "iptables -w -D FORWARD -j DROP")
	stops("neighbour", far4, "neighbour", "ip neigh flush dev vtep1024 nud permanent", "")
	stops("no route", far4, "route", "ip route delete "+subnet+" dev vtep1024; ip neigh flush dev vtep1024", "")
	must(t, s.StartAgent(h))
	must(t, h.WaitReady(t.Context()))
	must(t, far.Remove(t.Context()))
	stops("container gone", far4, "on host 172.17.0.3, container "+far4+": no container of this host has "+far4, "", "")
	script(t, h, "ip link delete $(ip -br link show master m-dcos | cut -d@ -f1)")
	stops("own interface gone", far4, "its interface on this host is gone", "", "")
	if _, err := os.Stat(h.RunDir); err != nil {
		t.Error(err)
	}
}
