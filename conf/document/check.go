package document

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// SyntaxError says that the text is not one JSON object, and where.
type SyntaxError struct{ text string }

func (e *SyntaxError) Error() string { return e.text }

// AmbiguousError says that an object has a key twice, in any case.
type AmbiguousError struct {
	Object     string // path of the object: "/", "/ipam/"
	Key, First string // the second key and the one before
}

func (e *AmbiguousError) Error() string {
	return fmt.Sprintf("%s: key %q after %q; keys must be unique, in any case", e.Object, e.Key, e.First)
}

// strictObjects are the objects we read something from, by path; their keys
// must be unique whatever their case, because encoding/json takes "NAME" for
// "name" and the last of two, and others do not. Other objects, such as a
// pod's annotations, are nobody's business but the runtime's.
var strictObjects = []string{
	"", "/ipam", "/capabilities", "/runtimeConfig", "/runtimeConfig/portMappings", "/dns",
	"/args", "/args/cni", "/args/org.apache.mesos", "/args/org.apache.mesos/network_info",
	"/args/org.apache.mesos/network_info/ip_addresses", "/args/org.apache.mesos/network_info/port_mappings",
	"/cni.dev/valid-attachments", "/cni.dev/attachments",
}

// Check proves that the text is one JSON object, not too deep and without
// ambiguous keys. The error is a *SyntaxError or an *AmbiguousError.
func Check(b []byte) error {
	w := walker{dec: json.NewDecoder(bytes.NewReader(b)), size: len(b)}
	w.dec.UseNumber()
	tok, err := w.dec.Token()
	if err != nil {
		return w.malformed(err)
	}
	if tok != json.Delim('{') {
		return &SyntaxError{"want a JSON object"}
	}
	if err := w.value(tok, "", 1); err != nil {
		return err
	}
	if _, err := w.dec.Token(); !errors.Is(err, io.EOF) {
		return &SyntaxError{fmt.Sprintf("something follows the JSON object at byte %d", w.dec.InputOffset())}
	}
	return nil
}

// A walker reads a document token by token.
type walker struct {
	dec  *json.Decoder
	size int
}

func (w *walker) malformed(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return &SyntaxError{fmt.Sprintf("the JSON ends too early, after %d bytes", w.size)}
	}
	return &SyntaxError{fmt.Sprintf("not JSON at byte %d: %v", w.dec.InputOffset(), err)}
}

// value walks a value whose first token has been read.
func (w *walker) value(tok json.Token, path string, depth int) error {
	open, ok := tok.(json.Delim)
	if !ok {
		return nil
	}
	if depth > maxDepth {
		return &SyntaxError{fmt.Sprintf("nested more than %d deep", maxDepth)}
	}
	strict := slices.Contains(strictObjects, path) || path == "/prevResult" || strings.HasPrefix(path, "/prevResult/")
	var keys map[string]string
	for {
		tok, err := w.dec.Token()
		if err != nil {
			return w.malformed(err)
		}
		if d, ok := tok.(json.Delim); ok && (d == '}' || d == ']') {
			return nil
		}
		child := path
		if open == '{' {
			key := tok.(string)
			child = path + "/" + key
			if strict {
				folded := strings.ToLower(strings.ToUpper(key))
				if first, twice := keys[folded]; twice {
					return &AmbiguousError{path + "/", key, first}
				}
				if keys == nil {
					keys = make(map[string]string)
				}
				keys[folded] = key
			}
			if tok, err = w.dec.Token(); err != nil {
				return w.malformed(err)
			}
		}
		if err := w.value(tok, child, depth+1); err != nil {
			return err
		}
	}
}
