package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/integration/lab"
)

const (
	reachHosts  = 20
	reachRounds = 30
)

// reach measures how long it takes until all of 20 agents, with identities and on
// two coordinators and etcd, forward as they should after another agent has come,
// moved and gone.
func reach(ctx context.Context, c *config) error {
	seed, err := lab.NewSeed(ctx, lab.Options{Bin: c.bin, Secure: true, Etcd: true}, singleYAML)
	if err != nil {
		return err
	}
	defer seed.Close()
	if err := seed.Up(ctx); err != nil {
		return err
	}
	hosts := seed.Hosts()
	for i := len(hosts); i < reachHosts; i++ {
		h, err := seed.Host(ctx, fmt.Sprint("more", i), byte(20+i))
		if err != nil {
			return err
		}
		if err := seed.StartAgent(h); err != nil {
			return err
		}
		if err := h.WaitReady(ctx); err != nil {
			return err
		}
		hosts = append(hosts, h)
	}
	if err := lab.WaitMesh(ctx, hosts...); err != nil {
		return err
	}
	var watches []*fdbWatch
	for _, h := range hosts {
		w, err := watchFDB(h.Netns)
		if err != nil {
			return err
		}
		defer w.close()
		watches = append(watches, w)
	}
	samples := map[string][]float64{}
	for i := range reachRounds {
		at, moved := netip.AddrFrom4([4]byte{172, 17, 9, byte(i)}), netip.AddrFrom4([4]byte{172, 17, 10, byte(i)})
		id := fmt.Sprintf("guest-%03d", i)
		registration := func(ip netip.Addr) any {
			return map[string]any{"agent_id": id, "agent_ip": ip, "bridges": []string{"mesos"}, "version": "bench"}
		}
		for _, step := range []struct {
			name, path string
			body       any
			typ        uint16
			to         netip.Addr
		}{
			{"an agent that joined", "/v1/register", registration(at), unix.RTM_NEWNEIGH, at},
			{"an agent that moved", "/v1/register", registration(moved), unix.RTM_NEWNEIGH, moved},
			{"an agent that was removed", "/overlay-master/agents/delete", map[string]any{"agents": []string{id}}, unix.RTM_DELNEIGH, moved},
		} {
			took, err := reachAll(ctx, seed.Coordinator, watches, step.path, step.body, step.typ, step.to)
			if err != nil {
				return fmt.Errorf("%s: %w", step.name, err)
			}
			samples[step.name] = append(samples[step.name], ms(took))
			if err := pause(ctx, 50*time.Millisecond); err != nil {
				return err
			}
		}
	}
	part := fmt.Sprintf("reaching %d hosts, etcd", reachHosts)
	for _, name := range []string{"an agent that joined", "an agent that moved", "an agent that was removed"} {
		row := c.report.add(part, name, "ms", samples[name])
		c.report.goal(part, name+", p95 (ms)", "", row.P95, "<=", 250)
	}
	return nil
}

// reachAll asks the coordinator and returns when every host has followed.
func reachAll(ctx context.Context, c *lab.Coordinator, watches []*fdbWatch, path string, body any, typ uint16, to netip.Addr) (time.Duration, error) {
	b, err := json.Marshal(body)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	g, seen := errgroup.WithContext(ctx)
	for _, w := range watches {
		g.Go(func() error { return w.until(seen, typ, to) })
	}
	began := time.Now()
	g.Go(func() error {
		req, err := http.NewRequestWithContext(seen, http.MethodPost, "http://coordinator"+path, bytes.NewReader(b))
		if err != nil {
			return err
		}
		res, err := c.Operator().Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		answer, err := io.ReadAll(res.Body)
		if err == nil && res.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", res.Status, answer)
		}
		return err
	})
	err = g.Wait()
	return time.Since(began), err
}

// fdbWatch hears of the forwarding entries of one host.
type fdbWatch struct {
	fd  int
	buf []byte
}

func watchFDB(n *lab.Netns) (*fdbWatch, error) {
	w := &fdbWatch{buf: make([]byte, 64<<10)}
	err := ns.WithNetNSPath(n.Path, func(ns.NetNS) (err error) {
		if w.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE); err != nil {
			return err
		}
		if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
			return err
		}
		return unix.Bind(w.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.RTNLGRP_NEIGH - 1)})
	})
	return w, err
}

func (w *fdbWatch) close() { unix.Close(w.fd) }

// until waits for a message of a type about an entry that sends to an address.
func (w *fdbWatch) until(ctx context.Context, typ uint16, to netip.Addr) error {
	for ctx.Err() == nil {
		size, _, err := unix.Recvfrom(w.fd, w.buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		for m := w.buf[:size]; len(m) >= unix.SizeofNlMsghdr; {
			n := int(binary.NativeEndian.Uint32(m))
			body := m[unix.SizeofNlMsghdr:n]
			if binary.NativeEndian.Uint16(m[4:]) == typ && body[0] == unix.AF_BRIDGE && bytes.Contains(body[unix.SizeofNdMsg:], to.AsSlice()) {
				return nil
			}
			m = m[min((n+3)&^3, len(m)):]
		}
	}
	return fmt.Errorf("no entry to %s: %w", to, context.Cause(ctx))
}
