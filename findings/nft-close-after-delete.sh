#!/usr/bin/env bash
# Linux 6.18: adding or deleting an element of an nftables set takes 0.05 ms, but
# closing the netlink socket after a deletion takes 15 ms, after an addition 0.01.
# The kernel frees removed elements after an RCU grace period, and who closes a
# socket waits for that (nft_rcv_nl_event), whoever removed them. It holds the
# lock of nftables meanwhile, which the kernel takes for every interface that goes.
# So many short programs that each delete one element stop each other, and the
# removal of interfaces: see plugins/internal/attach/turn.go and ADR 0051.
# Needs root, nft and python3 (standard library only).
set -euo pipefail
if [ "${1-}" != inside ]; then
	uname -r
	nft --version
	exec unshare --net "$0" inside
fi
printf 'table inet t {\n set s {\n type ipv4_addr\n }\n}\n' | nft -f -
python3 - <<'END'
import socket, statistics, struct, sys, time

NETFILTER, NFT = 12, 10  # protocol of netlink, subsystem of netfilter
NEWSETELEM, DELSETELEM = 12, 14
REQUEST, ACK, CREATE = 1, 4, 0x400

def attr(kind, data):
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)

def message(kind, flags, seq, family, resource, body=b""):
    payload = struct.pack("=BBH", family, 0, socket.htons(resource)) + body
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, seq, 0) + payload

def transaction(kind, flags, address):
    nested = 0x8000
    key = attr(1 | nested, attr(1, socket.inet_aton(address)))
    body = attr(1, b"t\0") + attr(2, b"s\0") + attr(3 | nested, attr(1 | nested, key))
    return (message(0x10, REQUEST, 1, 0, NFT) +  # begin
            message(NFT << 8 | kind, flags | REQUEST | ACK, 2, 1, 0, body) +
            message(0x11, REQUEST, 3, 0, NFT))  # end

def run(kind, flags, address):
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETFILTER)
    s.bind((0, 0))
    began = time.perf_counter()
    s.send(transaction(kind, flags, address))
    error = struct.unpack_from("=i", s.recv(8192), 16)[0]
    assert error == 0, error
    sent = time.perf_counter()
    s.close()
    return (sent - began) * 1e3, (time.perf_counter() - sent) * 1e3

took = {"add": [], "delete": []}
for i in range(1, 41):
    took["add"].append(run(NEWSETELEM, CREATE, f"192.0.2.{i}"))
    took["delete"].append(run(DELSETELEM, 0, f"192.0.2.{i}"))
closing = {}
for what, times in took.items():
    closing[what] = statistics.median(c for _, c in times)
    print(f"{what}: transaction {statistics.median(t for t, _ in times):.2f} ms, close {closing[what]:.2f} ms")
if closing["delete"] < 20 * closing["add"]:
    sys.exit("changed: closing the socket after a deletion is not slow any more")
END
