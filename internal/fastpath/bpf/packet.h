/* Headers as they are on the wire, and what is done to them. */
#ifndef OVERLAY_PACKET_H
#define OVERLAY_PACKET_H

#include "kernel.h"

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ICMPV6 58
#define IPPROTO_SCTP 132
#define IP_MF_OFFSET 0x3fff /* more fragments, or an offset */

#define VXLAN_PORT 64000
#define VXLAN_VNI 1024
#define VXLAN_FLAGS 0x08000000 /* a VNI is there, and nothing else */

/* These are not packed, although an IP header behind an Ethernet header is not
 * aligned: clang would read packed fields byte by byte. The kernel's verifier
 * allows for the place of the header. */
struct eth {
	__u8 dst[6];
	__u8 src[6];
	__u16 proto;
};

struct ip4 {
	__u8 vihl; /* 0x45: no options */
	__u8 tos;
	__u16 len;
	__u16 id;
	__u16 frag;
	__u8 ttl;
	__u8 proto;
	__u16 check;
	__u32 src;
	__u32 dst;
};

struct ip6 {
	__u32 vcf; /* version, traffic class, flow label */
	__u16 len;
	__u8 proto;
	__u8 ttl;
	__u32 src[4];
	__u32 dst[4];
};

struct udp {
	__u16 src;
	__u16 dst;
	__u16 len;
	__u16 check;
};

/* What follows the outer IP header, before the inner Ethernet header. */
struct tunnel {
	struct udp udp;
	__u32 flags;
	__u32 vni;
};

/* For their sizes; their parts are read by pointers of their own. */
struct frame4 {
	struct eth eth;
	struct ip4 ip;
	struct tunnel tunnel;
	struct eth inner;
} __attribute__((packed));

struct frame6 {
	struct eth eth;
	struct ip6 ip;
	struct tunnel tunnel;
	struct eth inner;
} __attribute__((packed));

/* What VXLAN adds to a packet. */
#define ROOM4 ((int)(sizeof(struct ip4) + sizeof(struct tunnel) + sizeof(struct eth)))
#define ROOM6 ((int)(sizeof(struct ip6) + sizeof(struct tunnel) + sizeof(struct eth)))

static __always_inline int same_mac(const __u8 *a, const __u8 *b)
{
	const __u16 *x = (const __u16 *)a, *y = (const __u16 *)b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2];
}

static __always_inline int same_ip6(const __u32 *a, const __u32 *b)
{
	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];
}

/* Nobody has the address that is all zeros. */
static __always_inline int given6(const __u32 *a)
{
	return (a[0] | a[1] | a[2] | a[3]) != 0;
}

static __always_inline int inside6(const __u32 *a, const __u32 *net, const __u32 *mask)
{
	return (a[0] & mask[0]) == net[0] && (a[1] & mask[1]) == net[1] &&
	       (a[2] & mask[2]) == net[2] && (a[3] & mask[3]) == net[3];
}

static __always_inline __u8 class6(const struct ip6 *ip)
{
	return ntohl(ip->vcf) >> 20;
}

/* One hop less, with the checksum brought along (RFC 1624). */
static __always_inline void forward4(struct ip4 *ip)
{
	__u32 check = ip->check + htons(0x0100);

	ip->check = check + (check >= 0xffff);
	ip->ttl--;
}

static __always_inline __u16 checksum4(const struct ip4 *ip)
{
	const __u16 *w = (const __u16 *)ip;
	__u32 sum = 0;

#pragma unroll
	for (int i = 0; i < 10; i++)
		sum += w[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

#define ECN_MASK 3
#define ECN_CE 3
#define ECN_ECT0 2

/* The congestion bits of the inner header as a tunnel shows them outside (RFC
 * 3168, as the kernel's own tunnels do it). */
static __always_inline __u8 ecn_outside(__u8 inner)
{
	__u8 ecn = inner & ECN_MASK;

	return ecn == ECN_CE ? ECN_ECT0 : ecn;
}

/* Length of the transport header, and the ports; 0: not a protocol that is taken.
 * A datagram for the VXLAN port is the firewall's to refuse. */
static __always_inline __u32 transport(void *l4, void *end, __u8 proto, __u32 *ports)
{
	struct udp *u = l4;

	switch (proto) {
	case IPPROTO_TCP:
		if (l4 + 20 > end)
			return 0;
		*ports = *(__u32 *)l4;
		return (((__u8 *)l4)[12] >> 4) * 4;
	case IPPROTO_UDP:
		if (l4 + sizeof(*u) > end || u->dst == htons(VXLAN_PORT))
			return 0;
		*ports = *(__u32 *)l4;
		return sizeof(*u);
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
	case IPPROTO_SCTP:
		return sizeof(*u);
	}
	return 0;
}

/* An IP packet as far as it matters here. */
struct packet {
	__u16 proto; /* of Ethernet */
	__u8 transport; /* protocol */
	__u8 class; /* type of service, traffic class */
	__u32 headers; /* length of the IP and transport headers */
	__u32 ports; /* 0: none */
};

/* plain4 says whether a packet is one that may be taken: no options, not a
 * fragment, hops left, and as long as it says. Anything else is answered,
 * refused or repaired by the kernel. */
static __always_inline int plain4(struct ip4 *ip, void *end, __u32 bytes, struct packet *p)
{
	__u32 l4 = transport(ip + 1, end, ip->proto, &p->ports);

	p->proto = htons(ETH_P_IP);
	p->transport = ip->proto;
	p->class = ip->tos;
	p->headers = sizeof(*ip) + l4;
	return l4 && ip->vihl == 0x45 && !(ip->frag & htons(IP_MF_OFFSET)) && ip->ttl > 1 && ntohs(ip->len) == bytes;
}

static __always_inline int plain6(struct ip6 *ip, void *end, __u32 bytes, struct packet *p)
{
	__u32 l4 = transport(ip + 1, end, ip->proto, &p->ports);

	p->proto = htons(ETH_P_IPV6);
	p->transport = ip->proto;
	p->class = class6(ip);
	p->headers = sizeof(*ip) + l4;
	return l4 && ip->ttl > 1 && ntohs(ip->len) + sizeof(*ip) == bytes;
}

/* flow_hash tells flows apart. The kernel's own takes a packet apart once more
 * where its socket has given it none. */
static __always_inline __u32 flow_hash(__u32 src, __u32 dst, __u32 ports, __u8 proto)
{
	__u64 x = ((__u64)src << 32 | dst) * 0x9e3779b97f4a7c15ULL;

	x ^= x >> 32;
	x = (x ^ ((__u64)ports << 8 | proto)) * 0xc2b2ae3d27d4eb4fULL;
	return x ^ x >> 32;
}

#endif
