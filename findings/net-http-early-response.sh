#!/usr/bin/env bash
# Go 1.26.8, net/http: a server whose answer is there before the client's request is
# (an SMTP or SSH server greets whoever connects) gives one of two errors, by which of
# two goroutines is first. Mostly it is `malformed HTTP response "220 ..."`. Where the
# answer is read before the request is counted, it is
# "readLoopPeekFailLocked: %!w(<nil>)": net/http wraps the error of a read that had
# none, so the text names no cause, and what was answered goes to the standard
# logger alone. Who wants to say "this is no HTTP server" cannot by that error.
# Here the client is held up, by a hook of net/http/httptrace, until that has
# happened. TestAnotherCause in overlayd/internal/agent answers only when asked for
# that reason. Fetches the toolchain where it is not installed.
set -euo pipefail
export GOTOOLCHAIN=go1.26.8
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >go.mod <<'G'
module finding
go 1.26
G
cat >main.go <<'G'
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strings"
)

func check(err error) {
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func main() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	over := make(chan struct{})
	go func() { // greets, then waits until the client has had enough
		defer close(over)
		conn, err := l.Accept()
		check(err)
		fmt.Fprint(conn, "220 mail.example\r\n")
		io.Copy(io.Discard, conn)
	}()
	hold := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { <-over }})
	req, err := http.NewRequestWithContext(hold, http.MethodGet, "http://"+l.Addr().String()+"/", nil)
	check(err)
	_, err = http.DefaultClient.Do(req)
	fmt.Println("got:", err)
	if err == nil || !strings.HasSuffix(err.Error(), "readLoopPeekFailLocked: %!w(<nil>)") {
		fmt.Println("changed: the error is another one")
		os.Exit(1)
	}
	fmt.Println("as stated: it wraps no error, and does not say what was answered")
}
G
go version
go run .
