package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"
)

// requestTimeout is how long an agent waits for an answer.
const requestTimeout = 10 * time.Second

// agentID is the id of the nth agent, and agentIP its address on the underlay.
func agentID(n int) string { return fmt.Sprintf("sim-%05d", n) }
func agentIP(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 1 + byte(n>>16), byte(n >> 8), byte(n)})
}

// source is the address the nth agent connects from. Every agent has one of its
// own, or the ports would not suffice.
func source(n int) *net.TCPAddr {
	n++
	return &net.TCPAddr{IP: net.IPv4(127, 1+byte(n>>16), byte(n>>8), byte(n))}
}

// peer is an agent as others see it; also what its lease must go on saying.
type peer struct {
	id, ip    string
	epoch     uint64
	vtep, mac string
	subnets   string // joined by blanks
}

// answer is what an agent reads of the answer to its registration.
type answer struct {
	ID    string `json:"agent_id"`
	IP    string `json:"agent_ip"`
	Epoch uint64 `json:"epoch"`
	VTEP  struct {
		IP  netip.Prefix `json:"ip"`
		MAC string       `json:"mac"`
	} `json:"vtep"`
	Overlays []struct {
		Subnet string `json:"subnet"`
		Error  string `json:"error"`
	} `json:"overlays"`
}

// conn is one connection of an agent.
type conn struct {
	net.Conn
	r    *bufio.Reader
	addr string
	got  int64 // bytes received
}

// dial connects to the coordinator, by TLS where that is spoken, from the address of
// the nth agent.
func (co *coordinator) dial(ctx context.Context, n, buffer int) (*conn, error) {
	d := net.Dialer{LocalAddr: source(n), Timeout: requestTimeout, KeepAlive: -1}
	nc, err := d.DialContext(ctx, "tcp", co.addr)
	if err != nil {
		return nil, err
	}
	if co.tls != nil {
		secure := tls.Client(nc, co.tls)
		if err := secure.HandshakeContext(ctx); err != nil {
			nc.Close()
			return nil, err
		}
		nc = secure
	}
	c := &conn{Conn: nc, addr: co.addr}
	c.r = bufio.NewReaderSize(countingReader{nc, &c.got}, buffer)
	return c, nil
}

type countingReader struct {
	r io.Reader
	n *int64
}

func (c countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	*c.n += int64(n)
	return n, err
}

// post sends one request and returns status and body of the answer.
func (c *conn) post(path, body string) (status string, answer []byte, err error) {
	return c.send(path, "", body)
}

// send is post with further headers.
func (c *conn) send(path, headers, body string) (status string, answer []byte, err error) {
	if err := c.SetDeadline(time.Now().Add(requestTimeout)); err != nil {
		return "", nil, err
	}
	_, err = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n%s", path, c.addr, len(body), headers, body)
	if err != nil {
		return "", nil, err
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	return resp.Status, answer, err
}

// register asks for the lease of the nth agent, or renews it.
func (c *conn) register(n int) (peer, error) {
	body := fmt.Sprintf(`{"agent_id":%q,"agent_ip":%q,"bridges":["mesos","docker"],"version":"sim"}`, agentID(n), agentIP(n))
	status, b, err := c.post("/v1/register", body)
	if err != nil {
		return peer{}, fmt.Errorf("register %s: %w", agentID(n), err)
	}
	if status != "200 OK" {
		return peer{}, fmt.Errorf("register %s: %s: %s", agentID(n), status, b)
	}
	var a answer
	if err := json.Unmarshal(b, &a); err != nil {
		return peer{}, fmt.Errorf("register %s: %w", agentID(n), err)
	}
	p := peer{id: a.ID, ip: a.IP, epoch: a.Epoch, vtep: a.VTEP.IP.Addr().String(), mac: a.VTEP.MAC}
	var subnets []string
	for _, o := range a.Overlays {
		if o.Subnet == "" {
			return peer{}, fmt.Errorf("register %s: no subnet: %s", agentID(n), o.Error)
		}
		subnets = append(subnets, o.Subnet)
	}
	p.subnets = strings.Join(subnets, " ")
	if p.id != agentID(n) || p.ip != agentIP(n).String() || p.subnets == "" || p.mac == "" {
		return peer{}, fmt.Errorf("register %s: the lease is that of somebody else, or empty: %s", agentID(n), b)
	}
	return p, nil
}

// report says that everything is in place.
func (c *conn) report(n int) error {
	status, b, err := c.post("/v1/status", fmt.Sprintf(`{"agent_id":%q,"overlays":{"v4":{"status":"STATUS_OK"}}}`, agentID(n)))
	if err != nil {
		return fmt.Errorf("report of %s: %w", agentID(n), err)
	}
	if status != "204 No Content" {
		return fmt.Errorf("report of %s: %s: %s", agentID(n), status, b)
	}
	return nil
}
