package coordinator_test

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"
)

// A hundred clients that ask for the state of 2,000 agents and do not read it
// share one copy of it.
func TestReadersThatDoNotRead(t *testing.T) {
	const agents, readers, limit = 2000, 100, 32 << 20
	n := start(t, newStore(t), seedNetwork)
	var all sync.WaitGroup
	turn := make(chan struct{}, 64)
	for i := range agents {
		all.Go(func() {
			turn <- struct{}{}
			defer func() { <-turn }()
			if _, err := n.Register(t.Context(), nth(i)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- n.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		<-served
	})
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapInuse
	}
	before := heap()
	for range readers {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := c.(*net.TCPConn).SetReadBuffer(4096); err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, "GET /overlay-master/state HTTP/1.1\r\nHost: x\r\n\r\n")
		if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != nil { // it is being answered
			t.Fatal(err)
		}
	}
	grown := int64(heap()) - int64(before)
	t.Logf("%d clients that do not read cost %d KiB", readers, grown>>10)
	if grown > limit {
		t.Errorf("that is more than %d KiB", limit>>10)
	}
}
