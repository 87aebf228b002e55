package document

import (
	"encoding/json"
	"net/netip"
	"strconv"
	"strings"

	"overlayd.internal/overlay/conf"
)

// A program that lives for four milliseconds cannot afford encoding/json on its
// usual way: the first value of each type costs a tour of reflection, 0.4 ms
// for the documents we read (ADR 0006).
//
// A scanner reads the JSON that agents and runtimes write nearly always: keys
// as we spell them, each once, ASCII strings without escapes, whole numbers, no
// null. At everything else it gives up, without a word about what is wrong:
// then encoding/json decides. So the scanner need not be complete, only right
// in what it accepts, and there is one place that explains mistakes.
type scanner struct {
	b     []byte
	i     int
	depth int
	lost  bool // gave up; nothing that was read counts
}

// fields are the keys of an object, at most 64, with the places their values go
// to. Keys that are not listed are skipped. They stay on the stack, which they
// would not if they were nested: a function in between reads the object below.
type fields []field

type field struct {
	key string
	to  any // see value
}

// document reads one object and nothing else. It returns false if encoding/json
// has to do it.
func (s *scanner) document(f fields) bool {
	s.object(f)
	s.space()
	return !s.lost && s.i == len(s.b)
}

// value reads a value into a place: the pointer of a field, or a function that
// reads.
func (s *scanner) value(to any) {
	switch to := to.(type) {
	case func():
		to()
	case *string:
		*to = s.text()
	case *int:
		*to = int(s.number(strconv.IntSize))
	case *int64:
		*to = s.number(64)
	case *uint64: // half the range, which is what the scanner can tell
		s.space()
		s.lost = s.lost || s.peek() == '-' // -0 is none for encoding/json either
		*to = uint64(s.number(64))
	case *bool:
		*to = s.boolean()
	case **bool:
		v := s.boolean()
		*to = &v
	case *[]string:
		*to = []string{}
		s.list(func() { *to = append(*to, s.text()) })
	case *json.RawMessage:
		s.space()
		start := s.i
		s.skip(true)
		*to = append(json.RawMessage{}, s.b[start:s.i]...)
	// By their types and not as a TextUnmarshaler, because what an interface's
	// method is called on has to be in the heap, and all that leads to it.
	case *netip.Addr:
		s.lost = to.UnmarshalText(s.quoted()) != nil || s.lost
	case *netip.Prefix:
		s.lost = to.UnmarshalText(s.quoted()) != nil || s.lost
	case *conf.Isolation:
		s.space()
		start := s.i
		s.skip(false)
		s.lost = to.UnmarshalJSON(s.b[start:s.i]) != nil || s.lost
	case *conf.MAC:
		s.lost = to.UnmarshalText(s.quoted()) != nil || s.lost
	default:
		s.lost = true
	}
}

func (s *scanner) object(f fields) {
	var seen uint64 // by position in f
	var others []string
	s.members(func(key []byte) {
		for i := range f {
			if string(key) == f[i].key {
				s.lost = s.lost || seen&(1<<i) != 0
				seen |= 1 << i
				s.value(f[i].to)
				return
			}
		}
		other := string(key)
		for i := range f {
			if strings.EqualFold(f[i].key, other) { // encoding/json would take it
				s.lost = true
			}
		}
		others = s.unique(others, other)
		s.skip(false)
	})
}

// skip reads a value that nobody wants to know.
func (s *scanner) skip(uniqueKeys bool) {
	s.space()
	switch c := s.peek(); {
	case c == '{':
		var seen []string
		s.members(func(key []byte) {
			if uniqueKeys {
				seen = s.unique(seen, string(key))
			}
			s.skip(uniqueKeys)
		})
	case c == '[':
		s.list(func() { s.skip(uniqueKeys) })
	case c == '"':
		s.quoted()
	case c == 't' || c == 'f':
		s.boolean()
	default:
		s.number(64)
	}
}

// maxDepth is how deep arrays and objects may be nested.
const maxDepth = 64

// maxKeys bounds the comparing of every key with every other.
const maxKeys = 64

// unique adds a key to those of an object, and gives up if it is there already.
func (s *scanner) unique(seen []string, key string) []string {
	for _, other := range seen {
		if strings.EqualFold(key, other) {
			s.lost = true
		}
	}
	s.lost = s.lost || len(seen) == maxKeys
	return append(seen, key)
}

// members reads an object and calls value after each key, to read its value.
func (s *scanner) members(value func(key []byte)) {
	s.sequence('{', '}', func() {
		key := s.quoted()
		s.want(':')
		if !s.lost {
			value(key)
		}
	})
}

func (s *scanner) list(value func()) { s.sequence('[', ']', value) }

func (s *scanner) sequence(open, end byte, value func()) {
	s.want(open)
	if s.depth++; s.depth > maxDepth {
		s.lost = true
	}
	for first := true; !s.lost && !s.take(end); first = false {
		if !first {
			s.want(',')
		}
		value()
	}
	s.depth--
}

func (s *scanner) text() string { return string(s.quoted()) }

// quoted reads a string. What it means is what stands there: no escapes, nothing
// but printable ASCII.
func (s *scanner) quoted() []byte {
	s.want('"')
	start := s.i
	for ; s.i < len(s.b); s.i++ {
		switch c := s.b[s.i]; {
		case c == '"':
			s.i++
			return s.b[start : s.i-1]
		case c < ' ' || c > '~' || c == '\\':
			s.lost = true
			return nil
		}
	}
	s.lost = true
	return nil
}

// number reads a whole number. A fraction or an exponent would be left over,
// and be lost for what follows.
func (s *scanner) number(bits int) int64 {
	s.space()
	start := s.i
	if s.peek() == '-' {
		s.i++
	}
	digits := s.i
	for s.peek() >= '0' && s.peek() <= '9' {
		s.i++
	}
	n, err := strconv.ParseInt(string(s.b[start:s.i]), 10, bits)
	if err != nil || s.b[digits] == '0' && s.i > digits+1 {
		s.lost = true
	}
	return n
}

func (s *scanner) boolean() bool {
	s.space()
	for _, word := range [...]string{"true", "false"} {
		if strings.HasPrefix(string(s.b[s.i:min(s.i+len(word), len(s.b))]), word) {
			s.i += len(word)
			return word == "true"
		}
	}
	s.lost = true
	return false
}

// want reads one character, which must be there; take, one that may be.
func (s *scanner) want(c byte) {
	if !s.take(c) {
		s.lost = true
	}
}

func (s *scanner) take(c byte) bool {
	s.space()
	if s.peek() != c || s.i == len(s.b) {
		return false
	}
	s.i++
	return true
}

// peek is the next character; zero at the end.
func (s *scanner) peek() byte {
	if s.i == len(s.b) {
		return 0
	}
	return s.b[s.i]
}

func (s *scanner) space() {
	for {
		switch s.peek() {
		case ' ', '\t', '\r', '\n':
			s.i++
		default:
			return
		}
	}
}
