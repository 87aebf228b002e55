#!/usr/bin/env bash
# Linux 6.18, iproute2 6.1: while the qdisc clsact is added to a device that is up, or
# deleted from it, the kernel takes the device's own queue away (qdisc_graft:
# dev_deactivate, dev_activate) and drops what is sent to the device until it is back,
# a grace period of RCU later, though clsact has no queue and only shows packets to
# filters. The sender gets no error; the device counts them as dropped. Expected:
# nothing is lost. Of 3,000 frames, 1,000 a second, 10 to 44 are lost while it is added
# 30 times and deleted 30 times (few on an idle machine, so that it is tried up to three
# times); none without, nor while a filter in a clsact that stays is replaced 60 times.
# ADR 0064: the qdisc comes with the interface, before that is up, and stays
# (plugins/internal/attach). Needs root and python3 (standard library only).
set -euo pipefail
if [ "${1-}" != inside ]; then
	uname -r
	tc -V
	exec unshare --net "$0" inside
fi
ip link add name v0 type veth peer name v1
ip link set v0 up
ip link set v1 up
exec python3 - <<'END'
import json, socket, subprocess, sys, threading, time

TOTAL, CHANGES, RATE = 3000, 60, 1000
EXPERIMENTAL = 0x88B5  # an ethertype that nobody else uses
SO_RCVBUFFORCE = 33  # which Python does not name

def bound(device, protocol):
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
    s.bind((device, protocol))
    return s

def tc(*argv):
    subprocess.run(("tc",) + argv, check=True)

def filter_replaced(_):
    tc("filter", "replace", "dev", "v0", "ingress", "prio", "1", "handle", "1", "protocol", "all", "bpf", "bytecode", "1,6 0 0 0,", "flowid", "1:1")

def toggled(i):
    tc("qdisc", "add" if i % 2 == 0 else "delete", "dev", "v0", "clsact")

def dropped():
    links = json.loads(subprocess.run(("ip", "-j", "-s", "link"), check=True, capture_output=True).stdout)
    return sum(link["stats64"][way][what] for link in links for way in ("rx", "tx") for what in ("dropped", "errors"))

def lost(change):
    receiver, sender = bound("v1", EXPERIMENTAL), bound("v0", 0)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
    ended = threading.Event()

    def send():
        began = time.perf_counter()
        for i in range(TOTAL):
            sender.send(b"\xff" * 6 + b"\x02" * 6 + EXPERIMENTAL.to_bytes(2, "big") + i.to_bytes(4, "big") + bytes(46))
            time.sleep(max(0, began + (i + 1) / RATE - time.perf_counter()))
        ended.set()

    thread = threading.Thread(target=send)
    began = time.perf_counter()
    thread.start()
    for i in range(CHANGES):
        time.sleep(max(0, began + i * TOTAL / RATE / CHANGES - time.perf_counter()))
        change(i)
    within = not ended.is_set()
    thread.join()
    receiver.setblocking(False)
    seen = set()
    try:
        while True:
            seen.add(receiver.recv(2048)[14:18])
    except BlockingIOError:
        pass
    receiver.close()
    sender.close()
    return TOTAL - len(seen), within

before = dropped()
def measure(what, change):
    n, within = lost(change)
    print(f"{what}: {n} of {TOTAL} lost")
    if not within:
        sys.exit("this machine is too slow for 60 changes within 3 s: nothing is shown")
    return n

if measure("nothing changed", lambda _: None):
    sys.exit("frames are lost without it: nothing is shown")
if not any(measure("clsact added and deleted", toggled) for _ in range(3)):
    sys.exit("changed: nothing is lost while the qdisc comes and goes")
print("the devices count as dropped:", dropped() - before)
tc("qdisc", "add", "dev", "v0", "clsact")
if measure("a filter replaced", filter_replaced):
    sys.exit("changed: frames are lost while a filter is replaced")
print("as stated")
END
