#!/usr/bin/env bash
# github.com/coreos/go-iptables v0.8.0 with iptables-nft (Debian 12, 1.8.9), in
# a network namespace without any rule: List of a chain that does not exist
# answers exit status 1 and a text about an incompatible table, and IsNotExist()
# of that error is false. A program that branches on IsNotExist takes a missing
# chain for a failure. Needs root.
set -euo pipefail
command -v iptables-nft >/dev/null || { echo "needs Debian's iptables"; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
cat >go.mod <<'G'
module finding
go 1.26
require github.com/coreos/go-iptables v0.8.0
G
cat >main.go <<'G'
package main

import (
	"errors"
	"fmt"

	"github.com/coreos/go-iptables/iptables"
)

func main() {
	ipt, err := iptables.New()
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = ipt.List("filter", "NOT-THERE")
	var e *iptables.Error
	if !errors.As(err, &e) {
		fmt.Println("no error of iptables:", err)
		return
	}
	fmt.Printf("exit %d IsNotExist %v: %s\n", e.ExitStatus(), e.IsNotExist(), e.Error())
}
G
GOFLAGS=-mod=mod go build -o finding . 2>/dev/null
mkdir bin && ln -s "$(command -v iptables-nft)" bin/iptables
iptables-nft --version
got=$(unshare --net env PATH="$work/bin:$PATH" ./finding)
printf '%s\n' "$got"
grep -q '^exit 1 IsNotExist false: .*is incompatible, use .nft. tool' <<<"$got" || { echo "changed: a missing chain is told in another way"; exit 1; }
echo "as stated: a missing chain is exit 1 and IsNotExist is false"
