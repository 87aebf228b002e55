/* What the agent tells the programs, and what they count for it. */
#ifndef OVERLAY_MAPS_H
#define OVERLAY_MAPS_H

#include "kernel.h"

/* Addresses are in network byte order. Where a field holds either family, an
 * IPv4 address is its first word and the others are 0. */
struct host {
	__u32 local[4]; /* agent IP */
	__u8 vtep_mac[6];
	__u16 family; /* of the underlay: AF_INET or AF_INET6; 0: take nothing */
	__u16 port_low; /* the kernel's range of local ports */
	__u16 port_span;
	__u32 ttl;
	__u32 uplink; /* index of the device that has the agent IP */
	__u32 direct; /* 1: peers may send without VXLAN, to that device */
};

/* One overlay: addresses that may talk to each other without a look at the
 * firewall. */
struct overlay {
	__u32 net4, mask4;
	__u32 net6[4], mask6[4];
	__u32 taken; /* 0: all of it goes the customary way */
};

/* Counts packets on the wire, so a segment of a large one is one. Bytes are
 * those of the inner frame. */
struct traffic {
	__u64 out_packets, out_bytes;
	__u64 in_packets, in_bytes;
	/* for a peer and from one, but left to the kernel */
	__u64 passed_out_packets, passed_out_bytes;
	__u64 passed_in_packets, passed_in_bytes;
	__u64 near_packets, near_bytes; /* from one container of this host to another */
};

struct prefix4 {
	__u32 bits;
	__u32 addr;
};

struct prefix6 {
	__u32 bits;
	__u32 addr[4];
};

struct peer {
	__u32 addr[4]; /* agent IP */
	__u8 vtep_mac[6];
	__u16 mtu; /* of the packets that it takes; 0: not known */
	__u32 direct; /* 1: is sent to without VXLAN where it is on a link */
};

/* What is behind the host end of a container's interface. */
struct attachment {
	__u32 addr4; /* 0: none */
	__u32 addr6[4];
	__u32 overlay;
	__u32 ifindex; /* of the host end */
	__u8 mac[6];
	__u8 gateway[6]; /* MAC of the bridge */
};

/* The way of a flow out of a container, as it was found: to a peer, or to a
 * container behind another bridge of this host. */
struct way {
	__u32 generation; /* of the maps that it was found in */
	__u32 ifindex; /* of the host end */
	__u64 until; /* when the kernel's routes are asked again, ns */
	__u8 macs[12]; /* of the inner frame: destination, source */
	__u16 proto; /* of Ethernet */
	__u16 port; /* source port of the tunnel */
	__u32 src[4], dst[4]; /* inner */
	__u32 overlay;
	struct peer to;
	__u32 near; /* 1: the container is on this host, and has no peer */
	__u32 out; /* index of the underlay device, or of the container's host end */
	__u32 family; /* of the next hop */
	__u32 hop[4];
	__u8 hop_macs[12]; /* of the frame that leaves: destination, source */
	__u16 mtu; /* of the route */
	__u16 id; /* of the last outer packet */
	__u32 on_link; /* 1: the peer is the next hop itself */
};

/* Who a flow out of a tunnel is for, as it was found. */
struct receipt {
	__u32 generation;
	__u32 proto; /* of Ethernet */
	__u32 from[4]; /* outer source */
	__u32 src[4], dst[4]; /* inner */
	struct attachment to;
};

#define MAX_OVERLAYS 1024
/* How long a way is used before the kernel is asked for it again, ns. */
#define WAY_LASTS (10 * 1000 * 1000)
#define FLOWS 1024 /* remembered by each processor; a power of 2 */
#define MAX_ATTACHMENTS 65536
#define MAX_PREFIXES 1048576
#define MAX_PEERS 65536

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct host);
	__uint(max_entries, 1);
} hosts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct overlay);
	__uint(max_entries, MAX_OVERLAYS);
} overlays SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct traffic);
	__uint(max_entries, MAX_OVERLAYS);
} counters SEC(".maps");

/* Grows after every change of the maps below. What was found before is found
 * again then. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
} generations SEC(".maps");

/* Flows by their hash; one takes the place of another. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct way);
	__uint(max_entries, FLOWS);
} ways SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct receipt);
	__uint(max_entries, FLOWS);
} receipts SEC(".maps");

/* Agent subnets of the peers. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct prefix4);
	__type(value, struct peer);
	__uint(max_entries, MAX_PREFIXES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} peers4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__type(key, struct prefix6);
	__type(value, struct peer);
	__uint(max_entries, MAX_PREFIXES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} peers6 SEC(".maps");

/* Agent IPs of the peers. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32[4]);
	__type(value, __u32);
	__uint(max_entries, MAX_PEERS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} senders SEC(".maps");

/* Attachments by the index of the host end, and by address. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct attachment);
	__uint(max_entries, MAX_ATTACHMENTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} links SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32);
	__type(value, struct attachment);
	__uint(max_entries, MAX_ATTACHMENTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} containers4 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, __u32[4]);
	__type(value, struct attachment);
	__uint(max_entries, MAX_ATTACHMENTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
} containers6 SEC(".maps");

#endif
