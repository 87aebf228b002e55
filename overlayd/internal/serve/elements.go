package serve

import (
	"fmt"
	"io"
)

// LimitElements is a body of JSON that cannot be read any further once it has more
// than so many elements and members, whatever they are in: these, and not its bytes,
// say how much memory the document takes.
func LimitElements(body io.ReadCloser, most int) io.ReadCloser {
	return &elements{ReadCloser: body, most: most}
}

// elements counts the commas that are not in a text.
type elements struct {
	io.ReadCloser
	most, commas  int
	text, escaped bool
}

func (e *elements) Read(p []byte) (int, error) {
	n, err := e.ReadCloser.Read(p)
	for _, c := range p[:n] {
		switch {
		case e.escaped:
			e.escaped = false
		case e.text && c == '\\':
			e.escaped = true
		case c == '"':
			e.text = !e.text
		case c == ',' && !e.text:
			e.commas++
		}
	}
	if e.commas >= e.most {
		return 0, &elementsError{e.most}
	}
	return n, err
}

type elementsError struct{ most int }

func (e *elementsError) Error() string { return fmt.Sprintf("more than %d elements", e.most) }
