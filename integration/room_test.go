package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// roomConfig has one overlay whose halves have 13 addresses.
const roomConfig = `
vtep_subnet: 44.128.0.0/20
vtep_subnet6: fd01:a::/64
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
- {name: tight, subnet: 9.0.0.0/16, prefix: 27, subnet6: "fd01:b::/64", prefix6: 80, blocks_per_agent: %d}
- {name: other, subnet: 10.7.0.0/16, prefix: 24}
`

// upRoom starts the hosts of the seed with that configuration; a block is given back
// when it has been empty for idle.
func upRoom(t *testing.T, blocks int, idle time.Duration, datapath string) *lab.Seed {
	t.Helper()
	return upRoomWith(t, fmt.Sprintf(roomConfig, blocks), idle, datapath, false)
}

// upRoomWith is upRoom with another configuration, and on either store.
func upRoomWith(t *testing.T, config string, idle time.Duration, datapath string, etcd bool) *lab.Seed {
	t.Helper()
	o := options()
	o.Secure, o.Etcd = true, etcd
	s := makeSeed(t, config, o)
	ctx := t.Context()
	must(t, s.StartCoordinator(ctx))
	for _, h := range s.Agents {
		must(t, h.StartAgent(s.Coordinator.URL, "--block-idle", idle.String(), "--cooling", "1s", "--datapath", datapath))
		must(t, h.WaitRegistered(ctx, s.Coordinator))
	}
	must(t, lab.WaitMesh(ctx, s.Agents...))
	return s
}

// blocksOf are the further blocks that a host publishes of an overlay.
func blocksOf(h *lab.Host, overlay string) (out []netip.Prefix, err error) {
	var s struct {
		Overlays []struct {
			Info   struct{ Name string }
			Blocks []struct{ Subnet netip.Prefix }
		}
	}
	b, err := os.ReadFile(filepath.Join(h.RunDir, "state.json"))
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	for _, o := range s.Overlays {
		for _, b := range o.Blocks {
			if o.Info.Name == overlay {
				out = append(out, b.Subnet)
			}
		}
	}
	return out, err
}

// attachAll attaches containers at once and lets none of them fail.
func attachAll(t *testing.T, h *lab.Host, overlay, half string, n int) []*lab.Container {
	t.Helper()
	all, errs := make([]*lab.Container, n), make([]error, n)
	var wg sync.WaitGroup
	start := time.Now()
	for i := range n {
		wg.Go(func() {
			all[i], errs[i] = h.Attach(t.Context(), fmt.Sprintf("%s-%s-%d", overlay, half, i), overlay, half)
		})
	}
	wg.Wait()
	must(t, errors.Join(errs...))
	t.Logf("%s: %d containers attached at once in %v", h.Name, n, time.Since(start).Round(time.Millisecond))
	seen := map[netip.Addr]bool{}
	for _, c := range all {
		for _, a := range c.Addrs {
			if seen[a.Addr()] {
				t.Errorf("%s was given out twice", a.Addr())
			}
			seen[a.Addr()] = true
		}
	}
	return all
}

// pingAll has every container ping every other one once, over every family.
func pingAll(t *testing.T, from, to []*lab.Container) {
	t.Helper()
	pairs := 0
	for i, c := range from {
		if i%8 == 0 {
			// The neighbours of all namespaces share the kernel's one table.
			for _, other := range append(append([]*lab.Container{}, from...), to...) {
				_, err := other.Run(t.Context(), "ip", "neigh", "flush", "all")
				must(t, err)
			}
		}
		var addrs []string
		for _, other := range to {
			if other == c {
				continue
			}
			for _, a := range other.Addrs {
				addrs = append(addrs, a.Addr().String())
				pairs++
			}
		}
		script := `for a; do ping -c 1 -W 2 $a >/dev/null 2>&1 || ping -c 2 -W 2 $a >/dev/null 2>&1 || echo $a; done; ip neigh flush all`
		out, err := c.Run(t.Context(), append([]string{"sh", "-c", script, "sh"}, addrs...)...)
		must(t, err)
		if out = strings.TrimSpace(out); out != "" {
			t.Errorf("%s %v does not reach %q", c.Name, c.Addrs, strings.Fields(out))
		}
	}
	t.Logf("%d pairs of addresses asked", pairs)
}

// TestRoom: 60 containers on a host whose half has 13 addresses. It gets further
// blocks in time, all of them reach each other and another host, and all is given
// back when they have gone.
func TestRoom(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"kernel", "ebpf", "etcd"} {
		if name == "etcd" && !*full {
			continue
		}
		t.Run(name, func(t *testing.T) {
			datapath := strings.Replace(name, "etcd", "kernel", 1)
			s := upRoomWith(t, fmt.Sprintf(roomConfig, 8), 4*time.Second, datapath, name == "etcd")
			here, there := s.Agents[0], s.Agents[1]
			ctx := t.Context()
			far := attachAll(t, there, "tight", lab.Docker, 20)
			docker := attachAll(t, here, "tight", lab.Docker, 60)
			mesos, err := here.Attach(ctx, "tight-mesos", "tight", lab.Mesos)
			must(t, err)
			blocks, err := blocksOf(here, "tight")
			must(t, err)
			if len(blocks) < 4 {
				t.Errorf("%d further blocks for 60 containers on halves of 13, want 4 at least: %v", len(blocks), blocks)
			}
			t.Logf("%s: further blocks %v", here.Name, blocks)
			if datapath == "ebpf" {
				waitDatapath(t, here, "ebpf", "")
			}
			to := append([]*lab.Container{mesos}, far[:2]...)
			if datapath == "kernel" { // what stays on a host goes the same way with both
				to = append(to, docker...)
			}
			pingAll(t, docker, to)
			pingAll(t, append([]*lab.Container{mesos}, far...), docker)
			if datapath == "ebpf" && fastPackets(t, here) == 0 {
				t.Error("no packet took the fast path")
			}
			checkStores(t, here)

			for _, c := range append(append([]*lab.Container{mesos}, docker...), far...) {
				must(t, c.Del(ctx))
			}
			waitGivenBack(t, s, "tight", "m-tight", "d-tight")
			for _, h := range s.Agents {
				checkNothingLeft(t, h)
			}
			// All that was given back can be had again.
			pingAll(t, attachAll(t, here, "tight", lab.Mesos, 30)[:3], far[:0])
		})
	}
}

// checkStores has the host compare its books.
func checkStores(t *testing.T, h *lab.Host) {
	t.Helper()
	out, err := h.Run(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "ipam", "check", "--run-dir", h.RunDir)
	if err != nil {
		t.Errorf("overlayctl ipam check: %v %s", err, out)
	}
}

// waitGivenBack waits until no host has a further block, by its own word, by the
// coordinator's and in the kernel.
func waitGivenBack(t *testing.T, s *lab.Seed, overlay string, bridges ...string) {
	t.Helper()
	ctx := t.Context()
	wait(t, "all further blocks to be given back", 2*time.Minute, func() error {
		out, err := s.Overlayctl(ctx, "overlays", "-o", "json")
		if err != nil {
			return err
		}
		var overlays []struct {
			Name   string
			Leases int
			Pool   struct{ Used int }
		}
		if err := json.Unmarshal([]byte(out), &overlays); err != nil {
			return err
		}
		for _, o := range overlays {
			if o.Name == overlay && o.Pool.Used != len(s.Agents) {
				return fmt.Errorf("%d blocks of %s are in use by %d hosts", o.Pool.Used, overlay, len(s.Agents))
			}
		}
		for _, h := range s.Agents {
			blocks, err := blocksOf(h, overlay)
			if err != nil || len(blocks) > 0 {
				return fmt.Errorf("%s publishes %v (%w)", h.Name, blocks, err)
			}
			for _, bridge := range bridges {
				out, err := h.Run(ctx, "ip", "-4", "-o", "addr", "show", "dev", bridge)
				if err != nil || strings.Count(out, "inet ") != 1 {
					return fmt.Errorf("%s has %q (%w)", bridge, out, err)
				}
			}
		}
		return nil
	})
}

// TestRoomOff: with blocks_per_agent 1 the 14th container of a half of 13 addresses
// is refused at once, as before.
func TestRoomOff(t *testing.T) {
	s := upRoom(t, 1, time.Hour, "kernel")
	h := s.Agents[0]
	attachAll(t, h, "tight", lab.Docker, 13)
	start := time.Now()
	_, out, err := ipam(context.WithoutCancel(t.Context()), h, "ADD", "tight", "docker", "x14")
	if err == nil || !strings.Contains(out, `"code":11`) && !strings.Contains(out, `"code": 11`) {
		t.Errorf("the 14th: %v, %s", err, out)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("the refusal took %v", took)
	}
	if !strings.Contains(out, "13 used, 0 cooling, 13 in all") {
		t.Errorf("the refusal says %s", out)
	}
	blocks, err := blocksOf(h, "tight")
	if err != nil || len(blocks) > 0 {
		t.Errorf("further blocks %v (%v)", blocks, err)
	}
}

// sharedConfig has one overlay whose halves share a pool of 29 addresses.
const sharedConfig = `
vtep_subnet: 44.128.0.0/20
vtep_subnet6: fd01:a::/64
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
- {name: one, subnet: 9.0.0.0/16, prefix: 27, subnet6: "fd01:b::/64", prefix6: 80, halves: shared}
`

// TestSharedHalves: Mesos and Docker draw from one pool, at once and beyond the first
// block, on one bridge. All reach all, doctor and the books agree, each pool is counted
// once, and everything is given back.
func TestSharedHalves(t *testing.T) {
	for _, store := range stores() {
		t.Run(store, func(t *testing.T) { shareHalves(t, store == "etcd") })
	}
}

func shareHalves(t *testing.T, etcd bool) {
	s := upRoomWith(t, sharedConfig, 4*time.Second, "ebpf", etcd)
	here, there := s.Agents[0], s.Agents[1]
	ctx := t.Context()
	var mesos, docker []*lab.Container
	var both sync.WaitGroup
	both.Go(func() { mesos = attachAll(t, here, "one", lab.Mesos, 20) })
	both.Go(func() { docker = attachAll(t, here, "one", lab.Docker, 20) })
	far := attachAll(t, there, "one", lab.Docker, 2)
	both.Wait()
	if t.Failed() {
		return
	}
	owner := map[netip.Addr]string{}
	for _, c := range append(append([]*lab.Container{}, mesos...), docker...) {
		for _, a := range c.Addrs {
			if other := owner[a.Addr()]; other != "" {
				t.Errorf("%s is given to %s and to %s", a.Addr(), other, c.Name)
			}
			owner[a.Addr()] = c.Name
		}
	}
	if blocks, err := blocksOf(here, "one"); err != nil || len(blocks) == 0 {
		t.Errorf("further blocks for 40 containers in a pool of 29: %v (%v)", blocks, err)
	}
	to := append(append(append([]*lab.Container{}, mesos[:3]...), docker[17:]...), far...)
	pingAll(t, to, append(to, docker[:3]...))
	checkStores(t, here)
	for _, args := range [][]string{{"doctor", "--run-dir", here.RunDir, "-o", "json"}, {"ipam", "show", "--run-dir", here.RunDir, "-o", "json"}} {
		out, _ := here.Run(ctx, append([]string{filepath.Join(here.Lab.Bin, "overlayctl")}, args...)...)
		switch args[0] {
		case "doctor":
			if strings.Contains(out, "cut off") || strings.Contains(out, "m-one") || strings.Contains(out, "d-one") {
				t.Errorf("doctor says %s", out)
			}
		default:
			if n := strings.Count(out, `"half": "shared"`); n == 0 || strings.Contains(out, `"half": "mesos",\n      "range"`) {
				t.Errorf("ipam show says %s", out)
			}
		}
	}
	if out, err := here.Run(ctx, "ip", "-o", "link", "show", "dev", "d-one"); err == nil {
		t.Errorf("there is a second bridge: %s", out)
	}
	for _, c := range append(append(mesos, docker...), far...) {
		must(t, c.Del(ctx))
	}
	waitGivenBack(t, s, "one", "m-one")
	for _, h := range s.Agents {
		checkNothingLeft(t, h)
	}
}
