#!/usr/bin/env bash
# Linux 6.18, iproute2 6.1: deleting a nexthop object takes its routes along.
# For the IPv6 route the kernel sends a notification; for the IPv4 route it
# sends none: the subscriber sees only that the nexthop went. The same holds
# for IPv4 routes that go because their link goes down. Needs root.
set -euo pipefail
if [ "${1-}" != inside ]; then
	uname -r
	ip -V
	exec unshare --net "$0" inside
fi
log=$(mktemp)
monitor=
trap '[ -z "$monitor" ] || kill "$monitor" 2>/dev/null || true; rm -f "$log"' EXIT
ip link set lo up
ip link add name v0 type veth peer name v1
ip link set v0 up
ip link set v1 up
ip address add 192.0.2.1/24 dev v0
ip -6 address add 2001:db8::1/64 dev v0 nodad
ip nexthop add id 1 via 192.0.2.2 dev v0
ip -6 nexthop add id 2 via 2001:db8::2 dev v0
ip route add 198.51.100.0/24 nhid 1
ip -6 route add 2001:db8:1::/64 nhid 2
ip monitor route nexthop >"$log" &
monitor=$!
# The monitor is ready when it reports a change.
for i in $(seq 100); do
	ip route replace 203.0.113.0/24 dev v0 metric "$i"
	grep -q 203.0.113.0 "$log" && break
done
ip nexthop delete id 1
ip -6 nexthop delete id 2
for _ in $(seq 200); do
	grep -q 'Deleted.*2001:db8:1::' "$log" && break
	read -rt 0.02 <> <(:) || true
done
echo "routes left: $(ip route show 198.51.100.0/24)$(ip -6 route show 2001:db8:1::/64)"
grep -E 'Deleted (id|198|2001)' "$log" || true
[ -z "$(ip route show 198.51.100.0/24)" ] || { echo "changed: the IPv4 route is still there"; exit 1; }
grep -q 'Deleted 2001:db8:1::' "$log" || { echo "changed: no notification for the IPv6 route"; exit 1; }
! grep -q 'Deleted 198.51.100.0' "$log" || { echo "changed: there is a notification for the IPv4 route"; exit 1; }
echo "as stated: the IPv4 route went without a notification"
