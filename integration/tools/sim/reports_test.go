package main

import (
	"bufio"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
)

// TestReportAgain: a report is sent again when the connection ends without an answer,
// and only so often; not when the answer says no.
func TestReportAgain(t *testing.T) {
	for _, c := range []struct {
		name   string
		ends   int64 // so many connections end before there is an answer
		answer string
		again  int64
		fails  string
	}{
		{"at once", 0, "204 No Content", 0, ""},
		{"after two", 2, "204 No Content", 2, ""},
		{"refused", 1, "503 Service Unavailable", 1, "503"},
		{"never", 100, "", reportTries - 1, "tries"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // they wait
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			var taken atomic.Int64
			go func() {
				for {
					conn, err := l.Accept()
					if err != nil {
						return
					}
					if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil && taken.Add(1) > c.ends {
						conn.Write([]byte("HTTP/1.1 " + c.answer + "\r\nContent-Length: 0\r\n\r\n"))
					}
					conn.Close()
				}
			}()
			s := &sim{coord: &coordinator{addr: l.Addr().String()}, reports: [][]byte{[]byte("{}")}}
			err = s.reportOne(t.Context(), 0)
			if c.fails == "" && err != nil || c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)) {
				t.Errorf("got %v, want %q", err, c.fails)
			}
			if got := s.again.Load(); got != c.again {
				t.Errorf("sent again %d times, want %d", got, c.again)
			}
		})
	}
}

// TestInTurn: who is first in one round is last in the next.
func TestInTurn(t *testing.T) {
	a, b, c := &contender{}, &contender{}, &contender{}
	list := []*contender{a, b, c}
	for round, want := range [][]*contender{{a, b, c}, {c, b, a}, {a, b, c}} {
		if got := inTurn(list, round); !slices.Equal(got, want) {
			t.Errorf("round %d: %v, want %v", round, got, want)
		}
	}
}
