package agent

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// post is an error of the client for one coordinator.
func post(host string, err error) error {
	return &url.Error{Op: "Post", URL: "https://" + host + ":6440/v1/register", Err: err}
}

func refusedBy(host string) error {
	return post(host, &net.OpError{Op: "dial", Net: "tcp", Addr: &net.TCPAddr{IP: net.ParseIP(host), Port: 6440}, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)})
}

// lostTo is the end of a connection that had a port of this host.
func lostTo(host string, port int, err error) error {
	return post(host, &net.OpError{Op: "read", Net: "tcp", Source: &net.TCPAddr{IP: net.ParseIP("10.0.0.9"), Port: port}, Addr: &net.TCPAddr{IP: net.ParseIP(host), Port: 6440}, Err: err})
}

// TestCauses: which failures of a sequence are logged.
func TestCauses(t *testing.T) {
	certificate := post("10.0.0.1", x509.UnknownAuthorityError{})
	timeout := func(port int) error { return lostTo("10.0.0.1", port, os.ErrDeadlineExceeded) }
	both := func(a, b error) error { return fmt.Errorf("POST /v1/register: %w", errors.Join(a, b)) }
	name := func(server string) error {
		return post("c.example", &net.DNSError{Err: "no such host", Name: "c.example", Server: server + ":53"})
	}
	for _, tt := range []struct {
		name   string
		errs   []error
		logged []int
	}{
		{"the same again", []error{refusedBy("10.0.0.1"), refusedBy("10.0.0.1")}, []int{0}},
		{"first nobody listens, then a certificate is wrong", []error{refusedBy("10.0.0.1"), certificate, certificate}, []int{0, 1}},
		{"other ports of this host", []error{timeout(40001), timeout(40002)}, []int{0}},
		{"how a coordinator goes", []error{post("10.0.0.1", io.EOF), lostTo("10.0.0.1", 40001, syscall.ECONNRESET), refusedBy("10.0.0.1")}, []int{0}},
		{"two coordinators, asked in turn", []error{both(refusedBy("10.0.0.1"), refusedBy("10.0.0.2")), both(refusedBy("10.0.0.2"), refusedBy("10.0.0.1"))}, []int{0}},
		{"of two coordinators one has a wrong certificate now", []error{both(refusedBy("10.0.0.1"), refusedBy("10.0.0.2")), both(refusedBy("10.0.0.2"), certificate)}, []int{0, 1}},
		{"two causes that take turns", []error{timeout(40001), refusedBy("10.0.0.1"), timeout(40002), refusedBy("10.0.0.1")}, []int{0, 1}},
		{"two name servers", []error{name("10.0.0.53"), name("10.0.1.53")}, []int{0}},
		{"a certificate that has expired", []error{
			post("10.0.0.1", errors.New("x509: certificate has expired or is not yet valid: current time 2026-11-27T19:00:00Z is after 2026-11-26T00:00:00Z")),
			post("10.0.0.1", errors.New("x509: certificate has expired or is not yet valid: current time 2026-11-27T19:00:09Z is after 2026-11-26T00:00:00Z")),
		}, []int{0}},
		{"leases are adopted", []error{&api.Error{Code: 503, Message: "until 19:00:00 UTC only"}, &api.Error{Code: 503, Message: "until 19:00:01 UTC only"}}, []int{0}},
		{"what the coordinator says", []error{&api.Error{Code: 409, Message: "a"}, &api.Error{Code: 409, Message: "b"}}, []int{0, 1}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, now := newCauses(), time.Now()
			var logged []int
			for i, err := range tt.errs {
				if c.met(c.of(err), now.Add(time.Duration(i)*time.Second)) {
					logged = append(logged, i)
				}
			}
			if fmt.Sprint(logged) != fmt.Sprint(tt.logged) {
				t.Errorf("logged are %v, want %v", logged, tt.logged)
			}
		})
	}
	c, now := newCauses(), time.Now()
	if !c.met("a", now) || c.met("a", now.Add(causeAge)) || !c.met("a", now.Add(3*causeAge)) {
		t.Error("a cause that was not met for long is to be logged again")
	}
}

// TestWording: what is published does not change from one attempt to the next.
func TestWording(t *testing.T) {
	a, b := lostTo("10.0.0.1", 40001, os.ErrDeadlineExceeded), lostTo("10.0.0.2", 40002, syscall.ECONNRESET)
	x := newCauses().wording(fmt.Errorf("POST /v1/register: %w", errors.Join(a, b)))
	y := newCauses().wording(fmt.Errorf("POST /v1/register: %w", errors.Join(lostTo("10.0.0.2", 50002, syscall.ECONNRESET), lostTo("10.0.0.1", 50001, os.ErrDeadlineExceeded))))
	if x != y || !strings.HasPrefix(x, `POST /v1/register: Post "https://10.0.0.1:6440/v1/register": read tcp 10.0.0.9->10.0.0.1:6440: i/o timeout`) || strings.Count(x, "\n") != 1 {
		t.Errorf("%q and %q", x, y)
	}
}

// TestAnotherCause: first nobody listens at the coordinator's address, then somebody who
// is none. Status and log say so, each once.
func TestAnotherCause(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.renew = 50 * time.Millisecond
	h.start()
	h.ready()
	c.stop()
	h.published("nobody listens", func(s conf.State) bool { return strings.Contains(s.Lease.Error, "connection refused") })
	var ln net.Listener
	eventually(t, "the coordinator's address is free", func() (err error) {
		c.remote.do(t, func() { ln, err = net.Listen("tcp", c.addr) })
		return err
	})
	defer ln.Close()
	met := make(chan struct{}, 100)
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			// Not before it is asked: net/http has several words for an answer without a question,
			// one of them empty (findings/net-http-early-response.sh).
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				conn.Close()
				continue
			}
			fmt.Fprint(conn, "220 mail.example\r\n")
			io.Copy(io.Discard, conn) // until the agent has had enough
			conn.Close()
			met <- struct{}{}
		}
	}()
	h.published("it is no coordinator", func(s conf.State) bool { return strings.Contains(s.Lease.Error, "malformed HTTP") })
	for range 3 {
		<-met
	}
	if n := strings.Count(h.log.String(), "lease not renewed"); n != 2 {
		t.Errorf("logged %d times, want once of each:\n%s", n, h.log)
	}
}
