package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// A host joins: lease, kernel, document, files, status.
func TestJoin(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("master", "172.17.0.2")
	h := newHost(c)
	h.opts.Listen = "127.0.0.1:0"
	before := conf.Boottime()
	h.start()
	h.ready()

	boot, err := conf.BootID()
	must(t, err)
	doc := h.document()
	left := time.Duration(doc.Lease.ExpiresBoottime) - before
	if left < 23*time.Hour || left > 23*time.Hour+time.Minute {
		t.Errorf("the lease ends in %s, want a day less the margin of an hour", left)
	}
	want := fmt.Sprintf(`{
  "agent_id": %q,
  "boot_id": %q,
  "configuration_attempts": 1,
  "cooling_seconds": 150,
  "coordinators": [
    "%s"
  ],
  "datapath": {
    "mode": "kernel",
    "taken": "kernel",
    "routing": "vxlan"
  },
  "directories": {
    "cni_conf": %q,
    "state": %q
  },
  "ip": "172.17.0.4",
  "lease": {
    "epoch": %d,
    "expires_boottime_ns": %d
  },
  "mtu": 1450,
  "overlays": [
    {
      "backend": {
        "vxlan": {
          "vni": 1024,
          "vtep_ip": "44.128.0.2/20",
          "vtep_ip6": "fd01:a::2/64",
          "vtep_mac": "70:b3:d5:80:00:02",
          "vtep_name": "vtep1024"
        }
      },
      "docker_bridge": {
        "ip": "9.0.1.128/25",
        "name": "d-dcos"
      },
      "info": {
        "name": "dcos",
        "prefix": 24,
        "subnet": "9.0.0.0/8"
      },
      "mesos_bridge": {
        "ip": "9.0.1.0/25",
        "name": "m-dcos"
      },
      "state": {
        "status": "STATUS_OK"
      },
      "subnet": "9.0.1.0/24"
    },
    {
      "backend": {
        "vxlan": {
          "vni": 1024,
          "vtep_ip": "44.128.0.2/20",
          "vtep_ip6": "fd01:a::2/64",
          "vtep_mac": "70:b3:d5:80:00:02",
          "vtep_name": "vtep1024"
        }
      },
      "docker_bridge": {
        "ip6": "fd01:b::1:8000:0:0/81",
        "name": "d-dcos6"
      },
      "info": {
        "name": "dcos6",
        "prefix6": 80,
        "subnet6": "fd01:b::/64"
      },
      "mesos_bridge": {
        "ip6": "fd01:b:0:0:1::/81",
        "name": "m-dcos6"
      },
      "state": {
        "status": "STATUS_OK"
      },
      "subnet6": "fd01:b:0:0:1::/80"
    }
  ],
  "room": [
    "dcos"
  ],
  "version": "1.2.3"
}`, h.id(), boot, c.urls()[0], h.opts.CNIConfDir, h.opts.StateDir, doc.Lease.Epoch, doc.Lease.ExpiresBoottime)
	raw, err := os.ReadFile(h.path(conf.StateFile))
	must(t, err)
	if diff := cmp.Diff(want, indented(t, raw)); diff != "" {
		t.Errorf("published document (-want +got):\n%s", diff)
	}
	for _, path := range []string{api.PathAgentOverlay, api.PathAgentOverlays} {
		code, body, err := h.get(path)
		if err != nil || code != http.StatusOK || body != string(raw) {
			t.Errorf("GET %s: %d %v %s; want the published document", path, code, err, body)
		}
	}

	for link, address := range map[string]string{
		conf.VTEPName: "44.128.0.2/20", "m-dcos": "9.0.1.1/25", "d-dcos": "9.0.1.129/25",
		"m-dcos6": "fd01:b::1:0:0:1/81", "d-dcos6": "fd01:b::1:8000:0:1/81",
	} {
		if err := hasAddr(link, address); err != nil {
			t.Error(err)
		}
	}
	eventually(t, "the other host is a peer", func() error {
		return errors.Join(hasRoute(prefix("9.0.0.0/24")), hasRoute(prefix("fd01:b::/80")))
	})
	for _, path := range []string{
		filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist"), filepath.Join(h.opts.CNIConfDir, "87-dcos6.conflist"),
		filepath.Join(h.opts.UCRConfDir, "dcos.conf"), filepath.Join(h.opts.UCRConfDir, "dcos6.conf"),
	} {
		b, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(b), h.opts.RunDir) {
			t.Errorf("%s: %v %s; want it to name the run directory", path, err, b)
		}
	}
	h.statusAt("status at the coordinator", allOK)

	h.stop()
	for _, path := range []string{h.stored(leaseFile), h.stored(peersFile), h.stored(idFile)} {
		if err := exists(path, true); err != nil {
			t.Error(err)
		}
	}
	if err := hasAddr("m-dcos", "9.0.1.1/25"); err != nil {
		t.Errorf("after the agent ended: %v", err)
	}
	if err := exists(h.path(conf.SocketFile), false); err != nil {
		t.Error(err)
	}
}

func indented(t *testing.T, b []byte) string {
	t.Helper()
	var v any
	must(t, json.Unmarshal(b, &v))
	out, err := json.MarshalIndent(json.RawMessage(strings.TrimSpace(string(b))), "", "  ")
	must(t, err)
	return string(out)
}

// Overlays come and go with the coordinator's configuration, and so do bridges
// and files.
func TestOverlaysComeAndGo(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()

	c.stop()
	c.Network.Overlays = append(c.Network.Overlays, conf.Overlay{Name: "extra", Subnet: prefix("10.5.0.0/16"), Prefix: 26})
	c.start()
	h.published("the new overlay", func(s conf.State) bool {
		o, ok := s.Overlay("extra")
		return ok && o.State.Status == conf.StatusOK
	})
	files := []string{filepath.Join(h.opts.CNIConfDir, "87-extra.conflist"), filepath.Join(h.opts.UCRConfDir, "extra.conf")}
	eventually(t, "bridge and files of the new overlay", func() error {
		return errors.Join(hasAddr("d-extra", "10.5.0.33/27"), exists(files[0], true), exists(files[1], true))
	})
	h.statusAt("status of the new overlay", func(s map[string]conf.OverlayStatus) bool { return s["extra"].Status == conf.StatusOK })

	c.stop()
	c.Network.Overlays = c.Network.Overlays[:2]
	c.start()
	h.published("the overlay is gone", func(s conf.State) bool { _, ok := s.Overlay("extra"); return !ok })
	eventually(t, "bridges and files are gone", func() error {
		return errors.Join(noLink("d-extra"), noLink("m-extra"), exists(files[0], false), exists(files[1], false))
	})
	if err := hasAddr("d-dcos", "9.0.0.129/25"); err != nil {
		t.Errorf("the other overlay: %v", err)
	}
	if !strings.Contains(h.log.String(), "overlay is no longer served") {
		t.Error("nothing was logged")
	}
}

// An exhausted pool fails its overlay by name, and no other.
func TestExhaustedOverlay(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	network := seedNetwork()
	network.Overlays = append(network.Overlays, conf.Overlay{Name: "tiny", Subnet: prefix("10.6.0.0/24"), Prefix: 24})
	c := newCluster(t, network)
	c.join("first", "172.17.0.3")
	h := newHost(c)
	h.start()
	h.notReady("overlay tiny: no free agent subnet") // to which no container can be attached
	s := h.document()
	tiny, _ := s.Overlay("tiny")
	if tiny.State == nil || tiny.State.Status != conf.StatusFailed || !strings.Contains(tiny.State.Error, "10.6.0.0/24") {
		t.Errorf("state of the exhausted overlay: %+v, want %s and the pool's name", tiny.State, conf.StatusFailed)
	}
	if tiny.DockerBridge != nil || tiny.MesosBridge != nil || tiny.Subnet.IsValid() {
		t.Errorf("the exhausted overlay has something: %+v", tiny)
	}
	if o, _ := s.Overlay("dcos"); o.State.Status != conf.StatusOK {
		t.Errorf("the other overlay: %+v", o.State)
	}
	if err := errors.Join(noLink("d-tiny"), exists(filepath.Join(h.opts.CNIConfDir, "87-tiny.conflist"), false)); err != nil {
		t.Error(err)
	}
	h.statusAt("status at the coordinator", func(s map[string]conf.OverlayStatus) bool {
		return s["tiny"].Status == conf.StatusFailed && strings.Contains(s["tiny"].Error, "10.6.0.0/24") && s["dcos"].Status == conf.StatusOK
	})
	// It asks again, and gets it when there is one.
	_, err := c.client().Delete(t.Context(), []string{"first"})
	must(t, err)
	h.restart()
	h.published("the overlay works", func(s conf.State) bool {
		o, _ := s.Overlay("tiny")
		return o.State != nil && o.State.Status == conf.StatusOK
	})
	h.ready()
}

// No lease at all: the reason is to be seen, and nothing is promised.
func TestNoLease(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	network := seedNetwork()
	network.VTEPSubnet, network.VTEPSubnet6 = prefix("44.128.0.0/30"), netip.Prefix{}
	network.Overlays = network.Overlays[:1]
	c := newCluster(t, network)
	c.join("a", "172.17.0.2")
	c.join("b", "172.17.0.3")
	h := newHost(c)
	h.start()
	h.notReady("44.128.0.0/30")
	_, body, err := h.get(api.PathAgentOverlay)
	must(t, err)
	var s conf.State
	must(t, json.Unmarshal([]byte(body), &s))
	if s.Lease.Lost == "" || !strings.Contains(s.Lease.Error, "44.128.0.0/30") || s.Overlays != nil {
		t.Errorf("document without a lease: %s", body)
	}
	if err := errors.Join(exists(h.path(conf.StateFile), false), noLink(conf.VTEPName)); err != nil {
		t.Error(err)
	}
	// Several tries later it was logged once.
	wait(t, time.Second)
	if n := strings.Count(h.log.String(), "registration failed"); n != 1 {
		t.Errorf("logged %d times, want once:\n%s", n, h.log)
	}
	_, err = c.client().Delete(t.Context(), []string{"a"})
	must(t, err)
	h.ready()
}

// A host without bridges leases and forwards.
func TestNoBridges(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("peer", "172.17.0.3")
	h := newHost(c)
	h.opts.Bridges = nil
	h.start()
	h.ready()
	for _, o := range h.document().Overlays {
		if o.DockerBridge != nil || o.MesosBridge != nil || !o.Subnet.IsValid() && !o.Subnet6.IsValid() {
			t.Errorf("overlay %+v, want a subnet and no bridges", o)
		}
	}
	eventually(t, "peer", func() error { return hasRoute(prefix("9.0.0.0/24")) })
	if err := errors.Join(noLink("m-dcos"), noLink("d-dcos"), exists(filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist"), false)); err != nil {
		t.Error(err)
	}

	// Bridges are wanted later: the agent's own word counts even while the
	// coordinator cannot be asked.
	h.stop()
	c.stop()
	h.opts.Bridges = []conf.Half{conf.Docker}
	h.start()
	h.ready()
	eventually(t, "bridge and file of one half", func() error {
		return errors.Join(hasAddr("d-dcos", "9.0.1.129/25"), noLink("m-dcos"), exists(filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist"), true))
	})
}

// What others break in the kernel is repaired at once.
func TestRepair(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("peer", "172.17.0.3")
	h := newHost(c)
	h.start()
	h.ready()
	eventually(t, "peer", func() error { return hasRoute(prefix("9.0.0.0/24")) })
	for _, name := range []string{"d-dcos", conf.VTEPName} {
		l, err := netlink.LinkByName(name)
		must(t, err)
		must(t, netlink.LinkDel(l))
		eventually(t, name+" is back", func() error {
			return errors.Join(hasAddr("d-dcos", "9.0.1.129/25"), hasRoute(prefix("9.0.0.0/24")))
		})
	}
	eventually(t, "it is logged", func() error {
		if !strings.Contains(h.log.String(), "kernel state repaired") {
			return errors.New("not yet")
		}
		return nil
	})

	// The other object is counted as well, whichever was last.
	eventually(t, "it is counted", func() error {
		d := h.document().Drift
		if d == nil || d.Last == "" || d.LastAt == "" {
			return fmt.Errorf("drift is %+v", d)
		}
		links := slices.IndexFunc(d.Counts, func(c conf.DriftCount) bool { return c.Kind == "link" })
		if links < 0 {
			return fmt.Errorf("drift is %+v", d)
		}
		return h.lines(fmt.Sprintf(`overlay_agent_drift_total{kind="link"} %d`, d.Counts[links].Objects), `overlay_agent_drift_total{kind="firewalld"} 0`)
	})

	// And the coordinator is told of it.
	eventually(t, "the coordinator knows", func() error {
		agents, err := c.client().Agents(t.Context())
		if err != nil {
			return err
		}
		d, sum := h.document(), 0
		for _, n := range d.Drift.Counts {
			sum += n.Objects
		}
		i := slices.IndexFunc(agents, func(a api.Agent) bool { return a.AgentID == d.AgentID })
		if i < 0 || agents[i].Host == nil || agents[i].Host.Drift != sum || agents[i].Host.MTU != d.MTU || agents[i].Host.Datapath != d.Datapath.Taken {
			return fmt.Errorf("the host is %+v, want drift %d, MTU %d", agents, sum, d.MTU)
		}
		return nil
	})

	// So is the document, at the next look.
	must(t, os.Remove(h.path(conf.StateFile)))
	d, err := netlink.LinkByName("d-dcos")
	must(t, err)
	must(t, netlink.LinkDel(d))
	h.published("the document is back", func(s conf.State) bool { return len(s.Overlays) == 2 })
	h.ready()
}
