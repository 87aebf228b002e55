package lab

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// EchoPort is where Serve listens.
const EchoPort = 5001

// Serve answers on EchoPort of the namespace until the lab is closed: it sends
// the address it saw the client come from on a line, then everything back.
func (l *Lab) Serve(ctx context.Context, n *Netns) error {
	listener, err := n.Listen(ctx, EchoPort)
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.closers = append(l.closers, listener)
	l.mu.Unlock()
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return // closed
			}
			go echo(c)
		}
	}()
	return nil
}

func echo(c net.Conn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	if _, err := fmt.Fprintln(c, from); err != nil {
		return
	}
	if _, err := io.Copy(c, c); err == nil {
		c.(*net.TCPConn).CloseWrite()
	}
}

// Transfer sends data to the echo at addr and checks that all of it comes back.
// It returns the address the other side saw.
func (n *Netns) Transfer(ctx context.Context, addr netip.Addr, data []byte) (seen netip.Addr, err error) {
	conn, err := n.Dial(ctx, netip.AddrPortFrom(addr, EchoPort))
	if err != nil {
		return seen, err
	}
	c := conn.(*net.TCPConn)
	defer c.Close()
	if d, ok := ctx.Deadline(); ok {
		c.SetDeadline(d)
	}
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		return seen, err
	}
	if seen, err = netip.ParseAddr(line[:len(line)-1]); err != nil {
		return seen, err
	}

	var back []byte
	var g errgroup.Group
	g.Go(func() error {
		_, err := c.Write(data)
		return errors.Join(err, c.CloseWrite())
	})
	g.Go(func() (err error) {
		back, err = io.ReadAll(r)
		return err
	})
	if err := g.Wait(); err != nil {
		return seen, fmt.Errorf("transfer: %w (%d of %d bytes came back)", err, len(back), len(data))
	}
	if !bytes.Equal(back, data) {
		return seen, fmt.Errorf("transfer: %d bytes sent, %d came back, not the same", len(data), len(back))
	}
	return seen, nil
}

var rttLine = regexp.MustCompile(`rtt min/avg/max/mdev = ([0-9.]+)/([0-9.]+)/`)

// Ping sends count echo requests, all of which must be answered, and returns
// the shortest round trip.
func (n *Netns) Ping(ctx context.Context, addr netip.Addr, count int) (time.Duration, error) {
	out, err := n.Run(ctx, "ping", "-n", "-q", "-c", strconv.Itoa(count), "-i", "0.02", "-W", "2", addr.String())
	if err != nil {
		return 0, err
	}
	sent, received, err := PingCounts(out)
	if err != nil {
		return 0, err
	}
	if received != sent {
		return 0, fmt.Errorf("ping %s: %d of %d answered", addr, received, sent)
	}
	m := rttLine.FindStringSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("no round trip in the output of ping: %s", out)
	}
	ms, err := strconv.ParseFloat(m[1], 64)
	return time.Duration(ms * float64(time.Millisecond)), err
}

var countLine = regexp.MustCompile(`(\d+) packets transmitted, (\d+) received`)

// PingCounts reads the last line of ping: packets sent and answered.
func PingCounts(out string) (sent, received int, err error) {
	m := countLine.FindStringSubmatch(out)
	if m == nil {
		return 0, 0, fmt.Errorf("no count in the output of ping: %s", out)
	}
	sent, _ = strconv.Atoi(m[1])
	received, _ = strconv.Atoi(m[2])
	return sent, received, nil
}

// Endpoint is one address somewhere in the lab.
type Endpoint struct {
	Name string
	NS   *Netns
	Addr netip.Addr
}

// Pair is two endpoints between which packets must pass.
type Pair struct {
	Kind     string // "same half", "other host", ...
	From, To Endpoint
	// Seen is the address the other side must see. The zero Addr: any.
	Seen netip.Addr
}

// Result is what became of a pair.
type Result struct {
	Pair
	RTT      time.Duration // of the quickest ping
	Transfer time.Duration // there and back
	Bytes    int           // of the transfer, one way
	Err      error
}

func (r Result) String() string {
	s := fmt.Sprintf("%s %s -> %s %s (%s)", r.From.Name, r.From.Addr, r.To.Name, r.To.Addr, r.Kind)
	if r.Err != nil {
		return s + ": " + r.Err.Error()
	}
	return s + ": ok"
}

// CheckPairs pings and transfers some data over TCP between all pairs, a few at
// a time, and returns the results in the order of the pairs. Every To must
// Serve.
func CheckPairs(ctx context.Context, pairs []Pair) []Result {
	data := make([]byte, 256<<10)
	rand.Read(data)
	results := make([]Result, len(pairs))
	var wg sync.WaitGroup
	turn := make(chan struct{}, 6)
	for i, p := range pairs {
		wg.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			results[i] = p.check(ctx, data)
		})
	}
	wg.Wait()
	return results
}

func (p Pair) check(ctx context.Context, data []byte) Result {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	r := Result{Pair: p, Bytes: len(data)}
	rtt, err := p.From.NS.Ping(ctx, p.To.Addr, 3)
	if err != nil {
		r.Err = err
		return r
	}
	r.RTT = rtt
	start := time.Now()
	seen, err := p.From.NS.Transfer(ctx, p.To.Addr, data)
	r.Transfer = time.Since(start)
	switch {
	case err != nil:
		r.Err = fmt.Errorf("tcp: %w", err)
	case p.Seen.IsValid() && seen != p.Seen:
		r.Err = fmt.Errorf("tcp: the other side saw %s, want %s", seen, p.Seen)
	}
	return r
}
