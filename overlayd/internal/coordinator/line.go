package coordinator

import (
	"bytes"
	"slices"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// encodeLine is an event as a line of JSON, in as much memory as it takes: lines are
// remembered, and one with every peer of a large cluster has megabytes.
func encodeLine(e api.PeerEvent) []byte {
	if len(e.Put) == 0 {
		return slices.Concat(encode(e), []byte{'\n'})
	}
	put := e.Put
	e.Put = []conf.Peer{{}}
	before, after, _ := bytes.Cut(encode(e), slices.Concat([]byte(`"put":[`), encode(conf.Peer{})))
	first := appendPeer(nil, put[0])
	line := make([]byte, 0, len(before)+len(after)+16+len(put)*(len(first)+len(first)/16))
	line = append(append(append(line, before...), `"put":[`...), first...)
	for _, p := range put[1:] {
		line = appendPeer(append(line, ','), p)
	}
	line = append(append(line, after...), '\n')
	if cap(line)-len(line) > len(line)/8 {
		line = bytes.Clone(line)
	}
	return line
}
