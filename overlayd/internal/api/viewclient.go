package api

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// ReportAttachments tells what has changed of an agent's containers. It returns
// how many bytes the report has on the wire.
func (c *Client) ReportAttachments(ctx context.Context, report AttachmentReport) (size int, err error) {
	body, err := PackReport(report)
	if err != nil {
		return 0, err
	}
	err = c.try(ctx, func(base string, limit, _ time.Duration) (bool, error) {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+PathAttachments, bytes.NewReader(body))
		if err != nil {
			return false, err
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Content-Encoding", "gzip")
		resp, err := c.hc.Do(req)
		if err != nil {
			return false, err
		}
		defer resp.Body.Close()
		if resp.StatusCode/100 != 2 {
			return false, readError(resp)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		return false, err
	})
	if err != nil {
		err = fmt.Errorf("%s %s: %w", http.MethodPost, PathAttachments, err)
	}
	return len(body), err
}

// PackReport is a report as it goes over the wire.
func PackReport(report AttachmentReport) ([]byte, error) {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err == nil {
		err = json.NewEncoder(w).Encode(report)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("pack the report: %w", err)
	}
	return b.Bytes(), nil
}

// Containers returns one page of the containers of the cluster that match the
// query: overlay, agent, q, after, limit.
func (c *Client) Containers(ctx context.Context, query url.Values) (found Containers, err error) {
	err = c.do(ctx, http.MethodGet, withQuery(PathContainers, query), nil, &found)
	return found, err
}

// Addresses tells how full the halves are that match the query: overlay, agent.
func (c *Client) Addresses(ctx context.Context, query url.Values) (a Addresses, err error) {
	err = c.do(ctx, http.MethodGet, withQuery(PathAddresses, query), nil, &a)
	return a, err
}

func withQuery(path string, query url.Values) string {
	if len(query) == 0 {
		return path
	}
	return path + "?" + query.Encode()
}

// maxEventLine bounds a line of the stream of events.
const maxEventLine = 64 << 10

// Events calls fn for every event after an id until ctx ends, fn fails, or the
// stream breaks; 0: all that are remembered, less: from now on. Then call it again
// with the id of the last event. With follow false it ends, with nil, after those
// that are remembered.
func (c *Client) Events(ctx context.Context, after int64, follow bool, fn func(Event) error) error {
	query := url.Values{}
	if !follow {
		query.Set("follow", "false")
	}
	if after >= 0 {
		query.Set("after", strconv.FormatInt(after, 10))
	}
	err := c.try(ctx, func(base string, limit, silence time.Duration) (bool, error) {
		return c.follow(ctx, base+withQuery(PathEvents, query), limit, silence, func(line []byte) error {
			data, ok := bytes.CutPrefix(line, []byte("data:"))
			if !ok {
				return nil
			}
			var e Event
			if err := json.Unmarshal(data, &e); err != nil {
				return fmt.Errorf("an event cannot be read: %w", err)
			}
			return fn(e)
		})
	})
	if errors.Is(err, errEnded) && !follow {
		return nil
	}
	return fmt.Errorf("follow events: %w", err)
}

var errEnded = errors.New("the coordinator ended the stream")

// Attachments calls fn for every line of the stream of what agents have reported to
// a coordinator, until ctx ends, fn fails, or the stream breaks. It never returns
// nil.
func (c *Client) Attachments(ctx context.Context, fn func(AttachmentLine) error) error {
	err := c.try(ctx, func(base string, limit, silence time.Duration) (bool, error) {
		return c.open(ctx, base+PathAttachments, "application/x-ndjson", limit, silence, func(r *receivedReader) error {
			lines := json.NewDecoder(r)
			for {
				var line AttachmentLine
				if err := lines.Decode(&line); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
					return errEnded
				} else if err != nil {
					return err
				}
				if err := fn(line); err != nil {
					return err
				}
			}
		})
	})
	return fmt.Errorf("follow reports: %w", err)
}

// follow reads the lines of a stream of events.
func (c *Client) follow(ctx context.Context, target string, limit, silence time.Duration, fn func(line []byte) error) (received bool, err error) {
	return c.open(ctx, target, "text/event-stream", limit, silence, func(r *receivedReader) error {
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, maxEventLine)
		for lines.Scan() {
			if err := fn(lines.Bytes()); err != nil {
				return err
			}
		}
		if err := lines.Err(); err != nil {
			return err
		}
		return errEnded
	})
}

// stream is a request whose answer has no end, or one that is waited for.
type stream struct {
	method, target string
	body           io.Reader // nil: none
	kind           string    // of the answer; empty: any
	limit, silence time.Duration
}

// open is openWith for GET.
func (c *Client) open(ctx context.Context, target, kind string, limit, silence time.Duration, read func(*receivedReader) error) (opened bool, err error) {
	return c.openWith(ctx, stream{method: http.MethodGet, target: target, kind: kind, limit: limit, silence: silence}, read)
}

// openWith has a stream read until it ends, or nothing is received for its limit, and
// after that for its silence.
func (c *Client) openWith(ctx context.Context, s stream, read func(*receivedReader) error) (opened bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	started := time.Now()
	quiet := time.AfterFunc(s.limit, func() {
		cancel(fmt.Errorf("nothing was received from the coordinator for %s", min(s.silence, time.Since(started)).Round(time.Second)))
	})
	defer quiet.Stop()
	req, err := http.NewRequestWithContext(ctx, s.method, s.target, s.body)
	if err != nil {
		return false, err
	}
	if s.body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.hc.Do(req)
	if err != nil {
		return false, because(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return false, readError(resp)
	}
	if got := resp.Header.Get("Content-Type"); !strings.HasPrefix(got, s.kind) {
		return false, fmt.Errorf("%s answers %q; is it a coordinator?", s.target, got)
	}
	return true, because(ctx, read(&receivedReader{resp.Body, quiet, s.silence}))
}
