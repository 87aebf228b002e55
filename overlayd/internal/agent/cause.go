package agent

import (
	"errors"
	"io"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// causes remembers why registrations failed, so that a cause is logged when it is
// another one, and not because it is worded otherwise.
type causes struct {
	last map[string]time.Time // when each was met
	// What differs from one attempt to the next: the port of this host, in an error of
	// the network; who did not know a name, one of several; when a certificate was looked
	// at; until when to wait, as a coordinator says it.
	localPort, nameServer, lookedAt, until *regexp.Regexp
}

func newCauses() *causes {
	return &causes{
		last:       map[string]time.Time{},
		localPort:  regexp.MustCompile(`:\d+->`),
		nameServer: regexp.MustCompile(` on \S+:53\b`),
		lookedAt:   regexp.MustCompile(`current time \S+ is`),
		until:      regexp.MustCompile(`\d\d:\d\d:\d\d UTC`),
	}
}

const (
	// causeAge is how long a cause is one of before: what comes and goes with others
	// within it is logged once.
	causeAge = 10 * time.Minute
	// maxCauses bounds them; a coordinator may say something else each time.
	maxCauses = 32
)

// met takes in a cause and reports whether it is to be logged.
func (c *causes) met(cause string, now time.Time) bool {
	last, known := c.last[cause]
	if !known && len(c.last) >= maxCauses {
		clear(c.last)
	}
	c.last[cause] = now
	return !known || now.Sub(last) > causeAge
}

// wording is the text of an error without what differs, and whichever of several
// coordinators was asked first; but it says until when to wait.
func (c *causes) wording(err error) string {
	text := err.Error()
	if all := joined(err); all != nil {
		parts := make([]string, len(all))
		for i, e := range all {
			parts[i] = e.Error()
		}
		before := strings.Join(parts, "\n")
		slices.Sort(parts)
		text = strings.Replace(text, before, strings.Join(slices.Compact(parts), "\n"), 1)
	}
	text = c.localPort.ReplaceAllLiteralString(text, "->")
	text = c.nameServer.ReplaceAllLiteralString(text, "")
	return c.lookedAt.ReplaceAllLiteralString(text, "the current time is")
}

// of is what tells a cause from others. That nobody listens, or the other side
// ends the connection, is one cause: it is how a coordinator goes, and stays away.
func (c *causes) of(err error) string {
	all := joined(err)
	if all == nil {
		all = []error{err}
	}
	parts := make([]string, len(all))
	for i, e := range all {
		parts[i] = c.until.ReplaceAllLiteralString(c.wording(e), "")
		var at *url.Error
		if goneAway(e) && errors.As(e, &at) {
			parts[i] = at.URL + ": gone"
		}
	}
	slices.Sort(parts)
	return strings.Join(slices.Compact(parts), "\n")
}

func goneAway(err error) bool {
	return slices.ContainsFunc([]error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE}, func(e error) bool {
		return errors.Is(err, e)
	})
}

// joined are the errors of which one is made by errors.Join, wherever it was wrapped;
// nil: of none.
func joined(err error) []error {
	for ; err != nil; err = errors.Unwrap(err) {
		if j, ok := err.(interface{ Unwrap() []error }); ok {
			return j.Unwrap()
		}
	}
	return nil
}
