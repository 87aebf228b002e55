package main

import (
	"encoding/json"
	"fmt"
	"hash/maphash"
	"strconv"
	"strings"
	"sync"
)

// event is one line of a stream, read.
type event struct {
	revision uint64
	snapshot bool
	register bool
	put      []entry
	deleted  []int
}

// entry says that an agent is now seen as the version-th distinct peer that any
// stream has shown.
type entry struct{ agent, version int32 }

// lines reads the lines of all streams. The coordinator says the same to
// everybody, so most lines have been seen before: a line is decoded when it is
// first seen, and from then on recognised by a 64-bit hash of all its bytes.
type lines struct {
	seed maphash.Seed

	mu     sync.Mutex
	known  map[lineKey]*line
	pieces map[lineKey]*piece
	peers  map[peer]int32   // version of every distinct peer, from 1
	texts  map[string]entry // what a peer's JSON says
}

type lineKey struct {
	hash   uint64
	length int
}

type line struct {
	once  sync.Once
	event *event
	err   error
}

func newLines() *lines {
	return &lines{
		seed: maphash.MakeSeed(), known: map[lineKey]*line{}, pieces: map[lineKey]*piece{},
		peers: map[peer]int32{}, texts: map[string]entry{},
	}
}

// short lines, heartbeats above all, are cheaper to decode than to remember.
const short = 512

func (l *lines) read(b []byte) (*event, error) {
	if len(b) < short {
		return l.decode(b)
	}
	key := lineKey{maphash.Bytes(l.seed, b), len(b)}
	l.mu.Lock()
	known := l.known[key]
	if known == nil {
		known = &line{}
		l.known[key] = known
	}
	l.mu.Unlock()
	known.once.Do(func() { known.event, known.err = l.decode(b) })
	return known.event, known.err
}

func (l *lines) decode(b []byte) (*event, error) {
	var raw struct {
		Revision uint64
		Snapshot bool
		Register bool
		Put      []json.RawMessage
		Delete   []string
	}
	if err := json.Unmarshal(b, &raw); err != nil {
		return nil, fmt.Errorf("a line of %d bytes: %w", len(b), err)
	}
	e := &event{revision: raw.Revision, snapshot: raw.Snapshot, register: raw.Register}
	for _, text := range raw.Put {
		p, err := l.peer(text)
		if err != nil {
			return nil, err
		}
		e.put = append(e.put, p)
	}
	for _, id := range raw.Delete {
		n, err := agentNumber(id)
		if err != nil {
			return nil, err
		}
		e.deleted = append(e.deleted, n)
	}
	return e, nil
}

// peer decodes a peer when its text is first seen. Every snapshot repeats it.
func (l *lines) peer(text []byte) (entry, error) {
	l.mu.Lock()
	e, ok := l.texts[string(text)]
	l.mu.Unlock()
	if ok {
		return e, nil
	}
	var p struct {
		ID      string   `json:"id"`
		IP      string   `json:"ip"`
		Epoch   uint64   `json:"epoch"`
		VTEP    string   `json:"vtep_ip"`
		MAC     string   `json:"vtep_mac"`
		Subnets []string `json:"subnets"`
	}
	if err := json.Unmarshal(text, &p); err != nil {
		return entry{}, fmt.Errorf("peer %s: %w", text, err)
	}
	n, err := agentNumber(p.ID)
	if err != nil {
		return entry{}, err
	}
	e = entry{int32(n), l.version(peer{p.ID, p.IP, p.Epoch, p.VTEP, p.MAC, strings.Join(p.Subnets, " ")})}
	l.mu.Lock()
	l.texts[string(text)] = e
	l.mu.Unlock()
	return e, nil
}

// version is the number of a peer among all distinct ones.
func (l *lines) version(p peer) int32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	v, ok := l.peers[p]
	if !ok {
		v = int32(len(l.peers) + 1)
		l.peers[p] = v
	}
	return v
}

func agentNumber(id string) (int, error) {
	s, ok := strings.CutPrefix(id, "sim-")
	n, err := strconv.Atoi(s)
	if !ok || err != nil || n < 0 || n >= maxAgents {
		return 0, fmt.Errorf("peer %q is none of the simulated agents", id)
	}
	return n, nil
}
