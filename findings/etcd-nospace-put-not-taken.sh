#!/usr/bin/env bash
# etcd server 3.4.23 (Debian 12), client go.etcd.io/etcd/client/v3 v3.6.1: while
# the NOSPACE alarm stands, a transaction that has a Put in a branch which is
# NOT taken is refused as well, though it would write nothing. Transactions of
# reads and deletes pass. A program that reads by Txn(If).Else(Put) cannot read.
# The quota is set to 1 MiB and filled with values of 256 KiB. Listens on loopback.
set -euo pipefail
command -v etcd >/dev/null || { echo "needs Debian's etcd-server"; exit 2; }
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || { kill "$server"; wait "$server" 2>/dev/null; } || true; rm -rf "$work"' EXIT
cd "$work"
cat >go.mod <<'G'
module finding
go 1.26
require go.etcd.io/etcd/client/v3 v3.6.1
G
cat >main.go <<'G'
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func main() {
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{os.Args[1]}, Logger: zap.NewNop()})
	check(err)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for { // until the server answers
		one, stop := context.WithTimeout(ctx, time.Second)
		_, err := c.Put(one, "k", "v")
		stop()
		if err == nil {
			break
		}
		check(ctx.Err())
	}
	// Filling the quota raises the alarm: it was started with 1 MiB.
	block := make([]byte, 256<<10)
	for i := range 40 {
		if _, err = c.Put(ctx, fmt.Sprint("fill", i), string(block)); err != nil {
			break
		}
	}
	fmt.Println("filled:", err)
	there := clientv3.Compare(clientv3.Version("k"), ">", 0)
	_, err = c.Txn(ctx).If(there).Then(clientv3.OpGet("k")).Else(clientv3.OpPut("k", "v")).Commit()
	fmt.Println("get, put not taken:", err)
	_, err = c.Txn(ctx).If(there).Then(clientv3.OpGet("k")).Commit()
	fmt.Println("get alone:", err)
	_, err = c.Txn(ctx).If(there).Then(clientv3.OpDelete("fill0")).Commit()
	fmt.Println("delete:", err)
}

func check(err error) {
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}
G
GOFLAGS=-mod=mod go build -o finding . 2>/dev/null
etcd --version | head -1
port=$((20000 + RANDOM % 10000))
etcd --data-dir "$work/data" --quota-backend-bytes $((1 << 20)) --listen-client-urls "http://127.0.0.1:$port" --advertise-client-urls "http://127.0.0.1:$port" \
	--listen-peer-urls "http://127.0.0.1:$((port + 1))" >"$work/log" 2>&1 &
server=$!
got=$(./finding "http://127.0.0.1:$port") || { printf "%s\n" "$got"; tail -3 "$work/log"; exit 1; }
printf '%s\n' "$got"
grep -q '^filled: .*database space exceeded' <<<"$got" || { echo "changed: the quota was not reached"; exit 1; }
grep -q '^get, put not taken: .*database space exceeded' <<<"$got" || { echo "changed: the transaction passes"; exit 1; }
grep -qx 'get alone: <nil>' <<<"$got" && grep -qx 'delete: <nil>' <<<"$got" || { echo "changed: reads or deletes are refused"; exit 1; }
echo "as stated: a Put in a branch that is not taken is refused"
