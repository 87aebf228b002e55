package coordinator

import (
	"bytes"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// fewPeers are encoded together with their event.
const fewPeers = 16

// encodeLine is an event as a line of JSON, in as much memory as it takes: lines are
// remembered, and one with every peer of a large cluster has megabytes. The encoder
// makes it in a buffer of its own that doubles, and keeps that; so peers go through
// it one by one.
func encodeLine(e api.PeerEvent) []byte {
	if len(e.Put) <= fewPeers {
		return slices.Concat(encode(e), []byte{'\n'})
	}
	put := e.Put
	e.Put = []conf.Peer{{}}
	none := encode(conf.Peer{})
	before, after, _ := bytes.Cut(encode(e), slices.Concat([]byte(`"put":[`), none))
	first := encode(put[0])
	line := make([]byte, 0, len(before)+len(after)+len(put)*(len(first)+len(first)/16))
	line = append(append(append(line, before...), `"put":[`...), first...)
	for _, p := range put[1:] {
		line = append(append(line, ','), encode(p)...)
	}
	line = append(append(line, after...), '\n')
	if cap(line)-len(line) > len(line)/8 {
		line = bytes.Clone(line)
	}
	return line
}
