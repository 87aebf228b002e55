package fastpath

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// exchange sends what no MTU holds through a TCP connection, there and back.
func exchange(from, to *space, at netip.Addr) error {
	l, err := listenTCP(to, at)
	if err != nil {
		return err
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, err = io.Copy(c, c)
			c.Close()
		}
		served <- err
	}()
	var c net.Conn
	err = from.ns.Inside(func() (err error) {
		c, err = net.DialTimeout("tcp", l.Addr().String(), 2*time.Second)
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	sent := make([]byte, 1<<20)
	rand.Read(sent)
	go func() {
		c.Write(sent)
		c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, sent) {
		return fmt.Errorf("%d bytes came back, %d were sent, or others", len(got), len(sent))
	}
	return <-served
}

func listenTCP(s *space, at netip.Addr) (l net.Listener, err error) {
	err = s.ns.Inside(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(at, 0).String())
		return err
	})
	return l, err
}

// Every pair of underlay and overlay family, and every pair of hosts with and
// without the fast path, carries TCP both ways; where a host has it, it takes
// the packets.
func TestTraffic(t *testing.T) {
	for _, six := range []bool{false, true} {
		for _, with := range [][2]bool{{true, true}, {true, false}, {false, true}} {
			t.Run(fmt.Sprintf("underlay6=%v,with=%v", six, with), func(t *testing.T) {
				r := newRig(t, six)
				var paths [2]*Path
				for i, h := range r.hosts {
					if with[i] {
						paths[i] = h.fast()
					}
				}
				a, b := r.hosts[0].container, r.hosts[1].container
				for _, to := range []netip.Addr{b.v4, b.v6} {
					before := [2]Traffic{}
					for i, p := range paths {
						if p != nil {
							before[i] = traffic(t, p)
						}
					}
					wait(t, func() error { return exchange(a.space, b.space, to) })
					for i, p := range paths {
						if p == nil {
							continue
						}
						now := traffic(t, p)
						out, in := now.Out.Bytes-before[i].Out.Bytes, now.In.Bytes-before[i].In.Bytes
						if out < 1<<20 || in < 1<<20 {
							t.Errorf("to %s: the fast path of host %d took %d bytes out and %d in, more than 1048576 each crossed", to, i+1, out, in)
						}
						if passed := now.PassedOut.Bytes + now.PassedIn.Bytes - before[i].PassedOut.Bytes - before[i].PassedIn.Bytes; passed > 1<<18 {
							t.Errorf("to %s: host %d left %d bytes to the kernel", to, i+1, passed)
						}
					}
				}
			})
		}
	}
}
