package coordinator

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// message is one event as it goes out: encoded once, and compressed at most
// once, for all streams. It takes who has got it to the revision to of a run.
type message struct {
	to   uint64
	run  string
	data []byte // a line of JSON

	pack   sync.Once
	packed []byte
}

// gzipHeader begins a stream of packed messages.
const gzipHeader = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"

// gzipped returns the message as a piece of a gzip stream: whole blocks that end
// on a byte and refer to nothing before them. So all streams can share it,
// whatever each was sent before. A stream of such pieces has no end and no
// checksum over all of it; it is cut when the coordinator or the agent ends it,
// and every line in it is a whole document.
func (m *message) gzipped(h *hub) []byte {
	m.pack.Do(func() {
		if len(m.data) <= maxStored {
			m.packed = slices.Concat(storedBlock(m.data), storedBlock(nil))
			return
		}
		m.packed = h.deflate(m.data)
	})
	return m.packed
}

// deflate packs with a compressor that is used again: its tables are larger than
// nearly all that it packs.
func (h *hub) deflate(data []byte) []byte {
	var b bytes.Buffer
	w, _ := h.packers.Get().(*flate.Writer)
	var err error
	if w == nil {
		w, err = flate.NewWriter(&b, flate.BestSpeed)
	} else {
		w.Reset(&b)
	}
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		panic(err) // of a known level, into memory; cannot fail
	}
	w.Reset(nil) // it is not to keep what it has packed
	h.packers.Put(w)
	return bytes.Clone(b.Bytes()) // it is remembered, and its buffer may be twice as large
}

// maxStored is up to which size a message is not compressed: a heartbeat, or
// one peer, is not worth a compressor's tables.
const maxStored = 512

// storedBlock is a deflate block that holds data as it is. An empty one has the
// reader hand on what it has got.
func storedBlock(data []byte) []byte {
	b := []byte{0} // not the last block, stored
	b = binary.LittleEndian.AppendUint16(b, uint16(len(data)))
	b = binary.LittleEndian.AppendUint16(b, ^uint16(len(data)))
	return append(b, data...)
}

// takesGzip reports whether a client says that it takes gzip.
func takesGzip(h http.Header) bool {
	for _, line := range h.Values("Accept-Encoding") {
		for part := range strings.SplitSeq(line, ",") {
			name, q, _ := strings.Cut(part, ";")
			if strings.EqualFold(strings.TrimSpace(name), "gzip") {
				q = strings.ReplaceAll(q, " ", "")
				return q != "q=0" && !(strings.HasPrefix(q, "q=0.") && strings.Trim(q[4:], "0") == "")
			}
		}
	}
	return false
}
