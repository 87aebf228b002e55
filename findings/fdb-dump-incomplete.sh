#!/usr/bin/env bash
# Linux 6.18, iproute2 6.1: while other entries come and go, a dump of a VXLAN
# device's FDB leaves out entries that nobody touches, and NLM_F_DUMP_INTR, the
# flag for a dump that has to be repeated, is not set (bridge(8) would say "Dump
# was interrupted"). 2,000 entries stay in place, 400 others are added and removed in
# batches, and up to 2,000 dumps are counted until one misses a resident entry. Needs root.
set -euo pipefail
if [ "${1-}" != inside ]; then
	uname -r
	ip -V
	exec unshare --net "$0" inside
fi
work=$(mktemp -d)
churn=
trap '[ -z "$churn" ] || kill "$churn" 2>/dev/null || true; rm -rf "$work"' EXIT
ip link set lo up
ip link add v type vxlan id 7 dstport 4789 local 127.0.0.1 nolearning
ip link set v up
mac() { printf '02:%02x:00:00:%02x:%02x' "$1" $(($2 / 256)) $(($2 % 256)); }
for i in $(seq 2000); do echo "fdb add $(mac 1 "$i") dev v dst 192.0.2.1"; done >"$work/stay"
for i in $(seq 400); do echo "fdb add $(mac 2 "$i") dev v dst 192.0.2.2"; done >"$work/come"
sed 's/fdb add/fdb del/; s/ dst.*//' "$work/come" >"$work/go"
bridge -batch "$work/stay"
(for _ in $(seq 20000); do
	bridge -batch "$work/come" && bridge -batch "$work/go" || exit
done) &
churn=$!
short=0 interrupted=0 dumps=0
for _ in $(seq 2000); do
	dumps=$((dumps + 1))
	n=$(bridge fdb show dev v 2>"$work/err" | grep '^02:01:' | sort -u | wc -l)
	! grep -q interrupted "$work/err" || interrupted=$((interrupted + 1))
	[ "$n" -eq 2000 ] || { short=$n; break; }
done
if [ "$short" -eq 0 ]; then
	echo "changed: $dumps dumps all had the 2000 resident entries"
	exit 1
fi
[ "$interrupted" -eq 0 ] || { echo "changed: $interrupted dumps were reported as interrupted"; exit 1; }
echo "dump $dumps had $short of 2000 resident entries"
echo "as stated: entries that nobody touched were missing, and no dump was reported as interrupted"
