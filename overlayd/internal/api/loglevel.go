package api

import (
	"context"
	"net/http"
)

// PathLogLevel is served by agent and coordinator. GET LogLevel; POST LogLevel ->
// LogLevel.
const PathLogLevel = "/v1/log-level"

// LogLevel is what a daemon logs at least: debug, info, warn or error.
type LogLevel struct {
	Level string `json:"level"`
}

// LogLevel asks for the level, or changes it unless to is empty.
func (c *Client) LogLevel(ctx context.Context, to string) (level LogLevel, err error) {
	if to == "" {
		err = c.do(ctx, http.MethodGet, PathLogLevel, nil, &level)
	} else {
		err = c.do(ctx, http.MethodPost, PathLogLevel, LogLevel{Level: to}, &level)
	}
	return level, err
}
