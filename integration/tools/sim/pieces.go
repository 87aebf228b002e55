package main

import (
	"bytes"
	"compress/flate"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"sync"
	"time"
)

// The coordinator compresses what it says once for all streams, so a gzip stream
// consists of pieces that refer to nothing before them. A piece is inflated when
// it is first seen, and from then on recognised by its bytes, like a line: agents
// take gzip, and a thousand of them could not inflate on the cores of the
// coordinator that is measured.

// gzipHeader is the length of the header before the first piece.
const gzipHeader = 10

// mark is what every piece ends with: an empty block. It may stand inside of one
// by chance, too.
var mark = []byte{0, 0, 0xff, 0xff}

// piece is what is known of the bytes up to a mark.
type piece struct {
	once   sync.Once
	whole  bool // the mark is the end of the piece
	events []*event
	plain  int64
	err    error
}

// piece reads the bytes up to a mark.
func (l *lines) piece(b []byte) *piece {
	key := lineKey{maphash.Bytes(l.seed, b), len(b)}
	l.mu.Lock()
	p := l.pieces[key]
	if p == nil {
		p = &piece{}
		l.pieces[key] = p
	}
	l.mu.Unlock()
	p.once.Do(func() { p.inflate(l, b) })
	return p
}

func (p *piece) inflate(l *lines, b []byte) {
	text, err := io.ReadAll(flate.NewReader(bytes.NewReader(b)))
	if !errors.Is(err, io.ErrUnexpectedEOF) { // no block of a stream is the last one
		p.err = fmt.Errorf("a piece of %d bytes ends the gzip stream: %w", len(b), err)
		return
	}
	if p.whole = bytes.HasSuffix(text, []byte("\n")); !p.whole {
		return
	}
	p.plain = int64(len(text))
	for line := range bytes.Lines(text) {
		e, err := l.read(line)
		if err != nil {
			p.err = err
			return
		}
		p.events = append(p.events, e)
	}
}

// readPacked takes in one piece after the other.
func (w *watcher) readPacked(c *conn, body io.Reader) error {
	if _, err := io.CopyN(io.Discard, body, gzipHeader); err != nil {
		return err
	}
	var pending []byte // what has come of a piece
	var seen int64
	long := false // it has the token of a long line
	defer func() {
		if long {
			<-w.big
		}
	}()
	for from := 0; ; from = max(from, len(pending)-len(mark)+1) {
		if len(pending) == cap(pending) {
			pending = append(make([]byte, 0, max(4<<10, 2*cap(pending))), pending...)
		}
		if !long && len(pending) >= bigLine {
			w.big <- struct{}{}
			long = true
		}
		if err := c.SetReadDeadline(time.Now().Add(silence)); err != nil {
			return err
		}
		n, err := body.Read(pending[len(pending):cap(pending)])
		if err != nil {
			return err
		}
		pending = pending[:len(pending)+n]
		for i := bytes.Index(pending[from:], mark); i >= 0; i = bytes.Index(pending[from:], mark) {
			from += i + len(mark)
			p := w.lines.piece(pending[:from])
			if p.err != nil {
				return p.err
			}
			if !p.whole {
				continue
			}
			w.mu.Lock()
			w.bytes += c.got - seen
			w.plain += p.plain
			for _, e := range p.events {
				w.take(e)
			}
			w.mu.Unlock()
			seen = c.got
			pending, from = pending[:copy(pending, pending[from:])], 0
			if long {
				pending = bytes.Clone(pending) // the long one is not kept
				<-w.big
				long = false
			}
		}
	}
}
