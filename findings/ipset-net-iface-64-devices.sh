#!/usr/bin/env bash
# ipset 7.17 (Debian 12), Linux 6.18: a set of type hash:net,iface holds at most
# 64 devices with the same address range, whatever maxelem says; the 65th is
# refused with "Hash is full". It also finds one only by walking all of them. A
# set of device names (0.0.0.0/0 and a name) is thus no good for many devices.
set -euo pipefail
command -v ipset >/dev/null || { echo "needs Debian's ipset, and root"; exit 2; }
ns=finding-ipset-$$
ip netns add "$ns"
trap 'ip netns del "$ns"' EXIT
ipset --version | sed 's/,.*//'
uname -sr
ip netns exec "$ns" ipset create s hash:net,iface maxelem 1048576
n=0
while said=$(ip netns exec "$ns" ipset add s "10.0.0.0/8,dev$n" 2>&1); do
	n=$((n + 1))
	[ "$n" -lt 200 ] || { echo "changed: 200 devices fit"; exit 1; }
done
echo "$n devices fit; the next one: $said"
[ "$n" -eq 64 ] || { echo "changed: it was 64"; exit 1; }
