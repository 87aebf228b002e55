#!/usr/bin/env bash
# github.com/google/nftables v0.3.0: the elements of one SetAddElements call go
# into one netlink attribute, whose length field has 16 bits. A call with 5,000
# IPv4 addresses returns no error, Flush returns no error, and the set holds a
# part of them. Calls of 1,000 are complete. Needs root (a network namespace).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >go.mod <<'G'
module finding
go 1.26
require github.com/google/nftables v0.3.0
G
cat >main.go <<'G'
package main

import (
	"fmt"
	"os"

	"github.com/google/nftables"
)

func fill(name string, total, perCall int) int {
	c, err := nftables.New()
	check(err)
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: name})
	s := &nftables.Set{Table: t, Name: "s", KeyType: nftables.TypeIPAddr}
	check(c.AddSet(s, nil))
	for from := 0; from < total; from += perCall {
		var e []nftables.SetElement
		for i := from; i < min(from+perCall, total); i++ {
			e = append(e, nftables.SetElement{Key: []byte{10, 0, byte(i >> 8), byte(i)}})
		}
		check(c.SetAddElements(s, e))
	}
	check(c.Flush())
	have, err := c.GetSetElements(s)
	check(err)
	return len(have)
}

func check(err error) {
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func main() {
	fmt.Println("one call of 5000:", fill("a", 5000, 5000))
	fmt.Println("calls of 1000:", fill("b", 5000, 1000))
}
G
GOFLAGS=-mod=mod go build -o finding . 2>/dev/null
got=$(unshare --net ./finding)
printf '%s\n' "$got"
grep -qx 'one call of 5000: 904' <<<"$got" || { echo "changed: the single call no longer leaves 904 elements"; exit 1; }
grep -qx 'calls of 1000: 5000' <<<"$got" || { echo "changed: calls of 1000 are not complete"; exit 1; }
echo "as stated: 4,096 of 5,000 elements lost, without an error"
