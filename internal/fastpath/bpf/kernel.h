/* The few declarations of the kernel's BPF interface that the programs need.
 * They are written down here, and not taken from the machine's headers, so that
 * the objects do not depend on where they are built.
 */
#ifndef OVERLAY_KERNEL_H
#define OVERLAY_KERNEL_H

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef long long __s64;

#define SEC(name) __attribute__((section(name), used))
#define __always_inline inline __attribute__((always_inline))
#define __uint(name, val) int(*name)[val]
#define __type(name, val) typeof(val) *name

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define memcpy __builtin_memcpy
#define NULL ((void *)0)

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define htons(x) ((__u16)__builtin_bswap16(x))
#define htonl(x) ((__u32)__builtin_bswap32(x))
#else
#define htons(x) ((__u16)(x))
#define htonl(x) ((__u32)(x))
#endif
#define ntohs htons
#define ntohl htonl

/* enum bpf_map_type */
#define BPF_MAP_TYPE_HASH 1
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_PERCPU_ARRAY 6
#define BPF_MAP_TYPE_LPM_TRIE 11
#define BPF_F_NO_PREALLOC 1

/* What a program of the traffic control layer answers. UNSPEC: the next filter
 * is asked, and then the packet goes on. */
#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT 2

/* bpf_skb_adjust_room */
#define BPF_ADJ_ROOM_MAC 1
#define BPF_F_ADJ_ROOM_FIXED_GSO (1ULL << 0)
#define BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 (1ULL << 1)
#define BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 (1ULL << 2)
#define BPF_F_ADJ_ROOM_ENCAP_L4_UDP (1ULL << 4)
#define BPF_F_ADJ_ROOM_NO_CSUM_RESET (1ULL << 5)
#define BPF_F_ADJ_ROOM_ENCAP_L2_ETH (1ULL << 6)
#define BPF_F_ADJ_ROOM_DECAP_L3_IPV4 (1ULL << 7)
#define BPF_F_ADJ_ROOM_DECAP_L3_IPV6 (1ULL << 8)
#define BPF_F_ADJ_ROOM_ENCAP_L2(len) (((__u64)(len)&0xff) << 56)

/* bpf_fib_lookup */
#define BPF_FIB_LKUP_RET_SUCCESS 0

#define BPF_CSUM_LEVEL_DEC 2
#define PACKET_HOST 0
#define AF_INET 2
#define AF_INET6 10

struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
	__u32 napi_id;
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 data_meta;
	__u64 flow_keys;
	__u64 tstamp;
	__u32 wire_len;
	__u32 gso_segs;
	__u64 sk;
	__u32 gso_size;
};

struct bpf_fib_lookup {
	__u8 family;
	__u8 l4_protocol;
	__u16 sport;
	__u16 dport;
	__u16 tot_len; /* in: length to compare with the MTU; out: the MTU */
	__u32 ifindex;
	__u32 flowinfo; /* out: rt_metric */
	__u32 src[4];
	__u32 dst[4]; /* out: the next hop */
	__u32 vlan;
	__u8 smac[6];
	__u8 dmac[6];
};

struct bpf_redir_neigh {
	__u32 nh_family;
	__u32 nh[4];
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_redirect)(__u32 ifindex, __u64 flags) = (void *)23;
static __u32 (*bpf_get_prandom_u32)(void) = (void *)7;
static long (*bpf_skb_pull_data)(struct __sk_buff *skb, __u32 len) = (void *)39;
static long (*bpf_skb_adjust_room)(struct __sk_buff *skb, int len, __u32 mode, __u64 flags) = (void *)50;
static long (*bpf_fib_lookup)(void *ctx, struct bpf_fib_lookup *params, int len, __u32 flags) = (void *)69;
static long (*bpf_skb_ecn_set_ce)(struct __sk_buff *skb) = (void *)97;
static __u64 (*bpf_ktime_get_coarse_ns)(void) = (void *)160;
static long (*bpf_csum_level)(struct __sk_buff *skb, __u64 level) = (void *)135;
static long (*bpf_redirect_neigh)(__u32 ifindex, struct bpf_redir_neigh *params, int len, __u64 flags) = (void *)152;
static long (*bpf_redirect_peer)(__u32 ifindex, __u64 flags) = (void *)155;
static long (*bpf_check_mtu)(void *ctx, __u32 ifindex, __u32 *mtu, int diff, __u64 flags) = (void *)163;

#endif
