package api

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"time"
)

// passed are the headers of a request that Pass hands on.
var passed = []string{"Accept", "Last-Event-Id", "If-None-Match"}

// Pass asks for what a browser asks for: one GET of a path with its query, whose
// answer, which may be a stream without an end, is the caller's to read and close.
// Whatever a coordinator says is an answer, unless another one may do better.
func (c *Client) Pass(ctx context.Context, path string, header http.Header) (resp *http.Response, err error) {
	err = c.try(ctx, func(base string, limit, _ time.Duration) (bool, error) {
		ctx, cancel := context.WithCancelCause(ctx)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+path, nil)
		if err != nil {
			cancel(nil)
			return false, err
		}
		for _, name := range passed {
			if v := header.Get(name); v != "" {
				req.Header.Set(name, v)
			}
		}
		late := time.AfterFunc(limit, func() { cancel(fmt.Errorf("no answer within %s", limit)) })
		answer, err := c.hc.Do(req)
		if !late.Stop() && err == nil {
			answer.Body.Close()
			err = context.Cause(ctx)
		}
		if err != nil {
			err = because(ctx, err)
			cancel(nil)
			return false, err
		}
		switch answer.StatusCode {
		case http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			err := readError(answer)
			answer.Body.Close()
			cancel(nil)
			return false, err
		}
		answer.Body = &passedBody{answer.Body, cancel}
		resp = answer
		return true, nil
	})
	if err != nil {
		return nil, fmt.Errorf("GET %s: %w", path, err)
	}
	return resp, nil
}

// passedBody ends the request with its answer.
type passedBody struct {
	io.ReadCloser
	cancel context.CancelCauseFunc
}

func (b *passedBody) Close() error {
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}
