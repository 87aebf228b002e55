package repair

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"overlayd.internal/overlay/integration/lab"
)

// pingPause is the time between two packets of a stream.
const pingPause = 10 * time.Millisecond

// patience is how long an answer may take.
const patience = 700 * time.Millisecond

// stream is a hundred echo requests a second from one namespace to one address.
type stream struct {
	to   netip.Addr
	conn net.PacketConn
	id   uint16

	mu       sync.Mutex
	sent     []time.Time
	answered []bool
	stop     chan struct{}
	done     sync.WaitGroup
}

var streams uint16

// startPing begins a stream.
func startPing(from *lab.Netns, to netip.Addr) (*stream, error) {
	network, any := "ip4:icmp", "0.0.0.0"
	if to.Is6() {
		network, any = "ip6:ipv6-icmp", "::"
	}
	streams++
	s := &stream{to: to, id: uint16(os.Getpid())<<8 ^ streams, stop: make(chan struct{})}
	var err error
	nsErr := ns.WithNetNSPath(from.Path, func(ns.NetNS) error {
		s.conn, err = net.ListenPacket(network, any)
		return nil
	})
	if nsErr != nil || err != nil {
		return nil, fmt.Errorf("ping from %s: %v %w", from.Name, nsErr, err)
	}
	s.done.Go(s.send)
	s.done.Go(s.receive)
	return s, nil
}

func (s *stream) send() {
	tick := time.NewTicker(pingPause)
	defer tick.Stop()
	packet := []byte{8, 0, 0, 0, 0, 0, 0, 0, 'o', 'v', 'e', 'r', 'l', 'a', 'y', 0}
	if s.to.Is6() {
		packet[0] = 128 // the kernel fills in the checksum
	}
	binary.BigEndian.PutUint16(packet[4:], s.id)
	for {
		s.mu.Lock()
		seq := uint16(len(s.sent))
		s.sent, s.answered = append(s.sent, time.Now()), append(s.answered, false)
		s.mu.Unlock()
		binary.BigEndian.PutUint16(packet[6:], seq)
		if s.to.Is4() {
			packet[2], packet[3] = 0, 0
			binary.BigEndian.PutUint16(packet[2:], checksum(packet))
		}
		_, _ = s.conn.WriteTo(packet, &net.IPAddr{IP: s.to.AsSlice()}) // what cannot be sent is lost
		select {
		case <-s.stop:
			return
		case <-tick.C:
		}
	}
}

func checksum(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func (s *stream) receive() {
	b := make([]byte, 1500)
	reply := byte(0)
	if s.to.Is6() {
		reply = 129
	}
	for {
		n, _, err := s.conn.ReadFrom(b)
		if err != nil {
			return
		}
		if n < 8 || b[0] != reply || binary.BigEndian.Uint16(b[4:]) != s.id {
			continue
		}
		s.mu.Lock()
		if seq := int(binary.BigEndian.Uint16(b[6:])); seq < len(s.answered) {
			s.answered[seq] = true
		}
		s.mu.Unlock()
	}
}

// lastAnswered reports whether the last n packets that had the time were answered.
func (s *stream) flows(n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	end := len(s.sent)
	for end > 0 && time.Since(s.sent[end-1]) < 100*time.Millisecond {
		end--
	}
	if end < n {
		return false
	}
	for _, ok := range s.answered[end-n : end] {
		if !ok {
			return false
		}
	}
	return true
}

// finish ends the stream and returns how many packets were sent and how many not
// answered.
func (s *stream) finish() (sent, lost int) {
	close(s.stop)
	for pending := true; pending; {
		pending, lost = false, 0
		s.mu.Lock()
		sent = len(s.sent)
		for i, ok := range s.answered {
			if !ok {
				lost++
				pending = pending || time.Since(s.sent[i]) < patience
			}
		}
		s.mu.Unlock()
		if pending {
			<-time.After(10 * time.Millisecond)
		}
	}
	s.conn.Close()
	s.done.Wait()
	return sent, lost
}
