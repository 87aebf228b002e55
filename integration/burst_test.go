package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// checkNothingLeft: no container is attached to the host, and the host's own
// comparison of stores, kernel and lease finds nothing wrong.
func checkNothingLeft(t *testing.T, h *lab.Host) {
	t.Helper()
	ports, err := h.BridgePorts(t.Context())
	must(t, err)
	if len(ports) > 0 {
		t.Errorf("%s: left over on the bridges: %q", h.Name, ports)
	}
	out, err := h.Run(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "ipam", "check", "--run-dir", h.RunDir)
	if err != nil {
		t.Errorf("overlayctl ipam check: %v", err)
	}
	t.Log(h.Name, "overlayctl ipam check:", strings.TrimSpace(out))
}

// ipam runs overlay-ipam on a host and returns the address it gave and its
// output.
func ipam(ctx context.Context, h *lab.Host, verb, overlay, half, container string) (netip.Prefix, string, error) {
	conf, err := json.Marshal(map[string]any{
		"cniVersion": "1.0.0", "name": overlay, "type": "overlay-ipam", "half": half, "runDir": h.RunDir,
		"ipam": map[string]any{"type": "overlay-ipam"},
	})
	if err != nil {
		return netip.Prefix{}, "", err
	}
	cmd := h.Command(ctx, filepath.Join(h.Lab.Bin, "overlay-ipam"))
	cmd.Env = []string{"CNI_COMMAND=" + verb, "CNI_CONTAINERID=" + container, "CNI_NETNS=/nonexistent", "CNI_IFNAME=eth0", "CNI_PATH=" + h.Lab.Bin}
	cmd.Stdin = strings.NewReader(string(conf))
	out, err := cmd.Output()
	if err != nil || verb != "ADD" {
		return netip.Prefix{}, string(out), err
	}
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal(out, &result); err != nil || len(result.IPs) != 1 {
		return netip.Prefix{}, string(out), fmt.Errorf("want one address: %w: %s", err, out)
	}
	return result.IPs[0].Address, string(out), nil
}

// checkDrains takes every address that a half has of the first block, which must be
// exactly want, and gives them back: nobody holds one, and none has got lost. Where
// the agent can have further blocks the next address is of one of those, before any
// that is cooling in the first is used early; those are counted by the store's word.
func checkDrains(t *testing.T, h *lab.Host, overlay, half string, want int) {
	t.Helper()
	ctx := t.Context()
	seen := map[netip.Addr]bool{}
	id := func(n int) string { return fmt.Sprintf("drain-%s-%d", half, n) }
	n := 0
	var block netip.Prefix
	for ; n <= want; n++ {
		p, out, err := ipam(ctx, h, "ADD", overlay, half, id(n))
		if err != nil {
			var e struct {
				Code int
				Msg  string
			}
			if jerr := json.Unmarshal([]byte(out), &e); jerr != nil || e.Code != 11 || !strings.Contains(e.Msg, overlay) || !strings.Contains(e.Msg, half) {
				t.Errorf("the refusal of an exhausted half is %v, %s; want code 11 and a sentence with overlay and half", err, out)
			}
			break
		}
		if seen[p.Addr()] {
			t.Errorf("%s was given out twice", p.Addr())
		}
		seen[p.Addr()] = true
		if n == 0 {
			block = p.Masked()
		}
		if p.Masked() != block {
			if _, out, err := ipam(ctx, h, "DEL", overlay, half, id(n)); err != nil {
				t.Fatalf("DEL %s: %v %s", id(n), err, out)
			}
			want -= coolingOf(t, h, block)
			break
		}
	}
	if n != want {
		t.Errorf("%s: the %s half of %s gave %d addresses, want %d", h.Name, half, overlay, n, want)
	}
	for i := range n {
		if _, out, err := ipam(ctx, h, "DEL", overlay, half, id(i)); err != nil {
			t.Fatalf("DEL %s: %v %s", id(i), err, out)
		}
	}
}

// coolingOf is how many addresses of a range are cooling.
func coolingOf(t *testing.T, h *lab.Host, block netip.Prefix) int {
	t.Helper()
	out, err := h.Run(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "ipam", "-o", "json", "--run-dir", h.RunDir)
	must(t, err)
	var s struct {
		Usage []struct {
			Range   netip.Prefix
			Cooling int
		}
	}
	must(t, json.Unmarshal([]byte(out), &s))
	for _, u := range s.Usage {
		if u.Range == block {
			return u.Cooling
		}
	}
	t.Fatalf("%s: nothing is told of %s: %s", h.Name, block, out)
	return 0
}

// TestBurst: 50 containers at once on each half of one host.
func TestBurst(t *testing.T) {
	s := upSeed(t, seedConfig(t))
	ctx := t.Context()
	h := s.Agents[0]
	const n = 50

	for _, half := range []string{lab.Mesos, lab.Docker} {
		t.Run(half, func(t *testing.T) {
			containers := make([]*lab.Container, n)
			errs := make([]error, n)
			all := func(f func(i int) error) time.Duration {
				t.Helper()
				var wg sync.WaitGroup
				start := time.Now()
				for i := range n {
					wg.Go(func() { errs[i] = f(i) })
				}
				wg.Wait()
				took := time.Since(start)
				must(t, errors.Join(errs...))
				return took
			}
			add := all(func(i int) (err error) {
				containers[i], err = h.Attach(ctx, fmt.Sprintf("%s-%d", half, i), "dcos", half)
				return err
			})
			seen := map[netip.Addr]bool{}
			for _, c := range containers {
				if seen[c.Addr()] {
					t.Errorf("%s was given out twice", c.Addr())
				}
				seen[c.Addr()] = true
			}
			if len(seen) != n {
				t.Errorf("%d addresses for %d containers", len(seen), n)
			}
			if ports, err := h.BridgePorts(ctx); err != nil || len(ports) != n {
				t.Errorf("%d ports on the bridges, want %d (%v)", len(ports), n, err)
			}
			_, err := containers[0].Ping(ctx, containers[n-1].Addr(), 3)
			must(t, err)

			del := all(func(i int) error { return containers[i].Del(ctx) })
			t.Logf("%d ADDs in %v, %d DELs in %v", n, add.Round(time.Millisecond), n, del.Round(time.Millisecond))
			checkNothingLeft(t, h)
			for _, c := range containers {
				out, err := c.Run(ctx, "ip", "-o", "link", "show", "type", "veth")
				must(t, err)
				if out != "" {
					t.Errorf("left over in %s: %s", c.Name, out)
				}
				must(t, c.Delete(ctx))
			}
			checkDrains(t, h, "dcos", half, 125)
		})
	}
}

// TestFailedAdd: an ADD that fails leaves no link and no address behind.
func TestFailedAdd(t *testing.T) {
	t.Parallel()
	s := upSeed(t, seedConfig(t))
	ctx := t.Context()
	h := s.Agents[0]
	for _, half := range []string{lab.Mesos, lab.Docker} {
		t.Run(half, func(t *testing.T) {
			c, err := h.Attach(ctx, "taken-"+half, "dcos", half)
			must(t, err)
			must(t, c.Del(ctx))
			// The interface name is taken.
			must(t, c.Configure(ctx, "link add name eth0 type bridge"))
			if err := c.Add(ctx); err == nil || !strings.Contains(err.Error(), "eth0") {
				t.Errorf("ADD over an existing eth0: %v; want an error that names it", err)
			}
			checkNothingLeft(t, h)
			must(t, c.Configure(ctx, "link delete eth0"))
			checkDrains(t, h, "dcos", half, 125)
		})
	}
}
