/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
 *
 * The fast path: VXLAN written and stripped here, and not by the kernel's vxlan
 * device; and packets to and from hosts on the same link without it.
 *
 * leave_container runs at the ingress of the host end of a container's
 * interface, enter_host at the ingress of the underlay devices. A packet that
 * they do not take goes on unchanged to the bridge, the routes, the firewall and
 * the vxlan device. Nothing is refused here: what may not pass is left to the
 * firewall, which refuses and counts it.
 */
#include "kernel.h"
#include "maps.h"
#include "packet.h"

static __always_inline struct host *configured(void)
{
	__u32 zero = 0;
	struct host *h = bpf_map_lookup_elem(&hosts, &zero);

	return h && h->family ? h : NULL;
}

static __always_inline struct overlay *overlay_of(const struct attachment *a)
{
	struct overlay *o = bpf_map_lookup_elem(&overlays, &a->overlay);

	return o && o->taken ? o : NULL;
}

/* Packets on the wire. */
static __always_inline __u32 segments(struct __sk_buff *skb)
{
	return skb->gso_segs ? skb->gso_segs : 1;
}

/* route finds the way to a peer as the kernel routes what the host itself
 * sends: next hop, device, and whether size bytes fit. 0: found. */
static __always_inline int route(struct __sk_buff *skb, const struct host *h, const struct peer *to, __u32 size,
				 __u16 port, struct bpf_fib_lookup *way)
{
	if (size > 0xffff)
		return -1;
	way->family = h->family;
	way->l4_protocol = IPPROTO_UDP;
	way->sport = port;
	way->dport = htons(VXLAN_PORT);
	way->tot_len = size;
	way->ifindex = 1; /* loopback: where the host's own packets come from */
	memcpy(way->src, h->local, sizeof(way->src));
	memcpy(way->dst, to->addr, sizeof(way->dst));
	return bpf_fib_lookup(skb, way, sizeof(*way), 0);
}

static __always_inline void write_tunnel(struct tunnel *t, const struct host *h, const struct peer *to, __u16 port,
					 __u32 length, __u16 proto)
{
	t->udp.src = port;
	t->udp.dst = htons(VXLAN_PORT);
	t->udp.len = htons(length + sizeof(*t));
	t->udp.check = 0;
	t->flags = htonl(VXLAN_FLAGS);
	t->vni = htonl(VXLAN_VNI << 8);
	memcpy(t->inner.dst, to->vtep_mac, 6);
	memcpy(t->inner.src, h->vtep_mac, 6);
	t->inner.proto = proto;
}

/* hop_less is what a router does to the packet behind the headers in at. */
static __always_inline int hop_less(void *at, void *end, __u16 proto)
{
	struct ip6 *ip = at;

	if (proto == htons(ETH_P_IP)) {
		if (at + sizeof(struct ip4) > end)
			return -1;
		forward4(at);
		return 0;
	}
	if (at + sizeof(*ip) > end)
		return -1;
	ip->ttl--;
	return 0;
}

/* counted notes what was sent to a peer. */
static __always_inline void count_out(__u32 overlay, __u32 packets, __u32 bytes)
{
	struct traffic *n = bpf_map_lookup_elem(&counters, &overlay);

	if (n) {
		n->out_packets += packets;
		n->out_bytes += bytes;
	}
}

/* hand_on gives a packet to the next hop of a way. */
static __always_inline int hand_on(struct __sk_buff *skb, const struct bpf_fib_lookup *way)
{
	struct bpf_redir_neigh hop = {};

	/* The queue was chosen on the container's interface, which has one. */
	skb->queue_mapping = 0;
	hop.nh_family = way->family;
	memcpy(hop.nh, way->dst, sizeof(hop.nh));
	return bpf_redirect_neigh(way->ifindex, &hop, sizeof(hop), 0);
}

/* on_link says whether a way leads to the peer itself, and not to a router. */
static __always_inline int on_link(const struct bpf_fib_lookup *way, const struct peer *to)
{
	return way->family == AF_INET ? way->dst[0] == to->addr[0] : same_ip6(way->dst, to->addr);
}

/* send_plain sends a packet to a peer on the link as it is. */
static __always_inline int send_plain(struct __sk_buff *skb, const struct bpf_fib_lookup *way, __u32 overlay,
				      const struct packet *p)
{
	__u32 bytes = skb->len, packets = segments(skb);
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (hop_less(data + sizeof(struct eth), end, p->proto))
		return TC_ACT_UNSPEC;
	count_out(overlay, packets, bytes);
	return hand_on(skb, way);
}

#define ROOM_FLAGS                                                                                     \
	(BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_ENCAP_L2_ETH |        \
	 BPF_F_ADJ_ROOM_ENCAP_L2(sizeof(struct eth)))

/* encapsulate sends a packet to a peer. Until there is room for the outer
 * headers it may still be left to the kernel; after that it is ours. */
static __always_inline int encapsulate(struct __sk_buff *skb, const struct host *h, const struct peer *to,
				       __u32 overlay, const struct packet *p)
{
	__u32 bytes = skb->len, length = bytes - sizeof(struct eth), packets = segments(skb), hash;
	__u32 size = skb->gso_size ? p->headers + skb->gso_size : length;
	struct bpf_fib_lookup way = {};
	int room = h->family == AF_INET ? ROOM4 : ROOM6;
	void *data, *end;
	__u16 port;

	if (to->mtu && size > to->mtu)
		return TC_ACT_UNSPEC; /* the kernel tells the sender */
	/* As the kernel chooses a tunnel's source port. */
	hash = bpf_get_hash_recalc(skb);
	hash ^= hash << 16;
	port = htons(h->port_low + (__u16)(((__u64)hash * h->port_span) >> 32));
	if (route(skb, h, to, size + room, port, &way))
		return TC_ACT_UNSPEC;
	if (to->direct && on_link(&way, to) && (p->proto == htons(ETH_P_IP)) == (h->family == AF_INET))
		return send_plain(skb, &way, overlay, p);

	if (h->family == AF_INET) {
		struct frame4 *f;

		if (bpf_skb_adjust_room(skb, ROOM4, BPF_ADJ_ROOM_MAC, ROOM_FLAGS | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4))
			return TC_ACT_UNSPEC;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		f = data;
		if (data + sizeof(*f) > end)
			return TC_ACT_SHOT;
		f->eth.proto = htons(ETH_P_IP);
		f->ip.vihl = 0x45;
		f->ip.tos = ecn_outside(p->class);
		f->ip.len = htons(length + ROOM4);
		f->ip.id = bpf_get_prandom_u32();
		f->ip.frag = 0;
		f->ip.ttl = h->ttl;
		f->ip.proto = IPPROTO_UDP;
		f->ip.check = 0;
		f->ip.src = h->local[0];
		f->ip.dst = to->addr[0];
		f->ip.check = checksum4(&f->ip);
		write_tunnel(&f->tunnel, h, to, port, length, p->proto);
		if (hop_less(data + sizeof(*f), end, p->proto))
			return TC_ACT_SHOT;
	} else {
		struct frame6 *f;

		if (bpf_skb_adjust_room(skb, ROOM6, BPF_ADJ_ROOM_MAC, ROOM_FLAGS | BPF_F_ADJ_ROOM_ENCAP_L3_IPV6))
			return TC_ACT_UNSPEC;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		f = data;
		if (data + sizeof(*f) > end)
			return TC_ACT_SHOT;
		f->eth.proto = htons(ETH_P_IPV6);
		f->ip.vcf = htonl(0x60000000 | (__u32)ecn_outside(p->class) << 20);
		f->ip.len = htons(length + sizeof(f->tunnel));
		f->ip.proto = IPPROTO_UDP;
		f->ip.ttl = h->ttl;
		memcpy(f->ip.src, h->local, sizeof(f->ip.src));
		memcpy(f->ip.dst, to->addr, sizeof(f->ip.dst));
		write_tunnel(&f->tunnel, h, to, port, length, p->proto);
		if (hop_less(data + sizeof(*f), end, p->proto))
			return TC_ACT_SHOT;
	}

	count_out(overlay, packets, bytes);
	return hand_on(skb, &way);
}

SEC("tc")
int leave_container(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 ifindex = skb->ifindex, bytes = skb->len, packets = segments(skb), overlay;
	int verdict = TC_ACT_UNSPEC, plain;
	struct packet p = {};
	struct eth *eth = data;
	struct attachment *a;
	struct overlay *o;
	struct traffic *n;
	struct host *h;
	struct peer *to;

	if (data + sizeof(*eth) + sizeof(struct ip4) > end || skb->vlan_present)
		return TC_ACT_UNSPEC;
	a = bpf_map_lookup_elem(&links, &ifindex);
	if (!a || !same_mac(eth->src, a->mac) || !same_mac(eth->dst, a->gateway))
		return TC_ACT_UNSPEC;
	h = configured();
	o = overlay_of(a);
	if (!h || !o)
		return TC_ACT_UNSPEC;
	overlay = a->overlay;

	if (eth->proto == htons(ETH_P_IP)) {
		struct ip4 *ip = data + sizeof(*eth);
		struct prefix4 key = { 32, ip->dst };

		if (!a->addr4 || ip->src != a->addr4 || (ip->dst & o->mask4) != o->net4)
			return TC_ACT_UNSPEC;
		to = bpf_map_lookup_elem(&peers4, &key);
		plain = plain4(ip, end, bytes - sizeof(*eth), &p);
	} else if (eth->proto == htons(ETH_P_IPV6)) {
		struct ip6 *ip = data + sizeof(*eth);
		struct prefix6 key = { 128 };

		if ((void *)(ip + 1) > end || !given6(a->addr6) || !same_ip6(ip->src, a->addr6) ||
		    !inside6(ip->dst, o->net6, o->mask6))
			return TC_ACT_UNSPEC;
		memcpy(key.addr, ip->dst, sizeof(key.addr));
		to = bpf_map_lookup_elem(&peers6, &key);
		plain = plain6(ip, end, bytes - sizeof(*eth), &p);
	} else {
		return TC_ACT_UNSPEC;
	}
	if (!to)
		return TC_ACT_UNSPEC;
	if (plain)
		verdict = encapsulate(skb, h, to, overlay, &p);
	if (verdict == TC_ACT_UNSPEC) {
		n = bpf_map_lookup_elem(&counters, &overlay);
		if (n) {
			n->passed_packets += packets;
			n->passed_bytes += bytes;
		}
	}
	return verdict;
}

/* give hands a packet, with its Ethernet header in front, to its container. */
static __always_inline int give(struct __sk_buff *skb, const struct attachment *to, __u16 proto, __u32 packets)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct eth *eth = data;
	struct traffic *n;

	if (data + sizeof(*eth) > end)
		return TC_ACT_SHOT;
	memcpy(eth->dst, to->mac, 6);
	memcpy(eth->src, to->gateway, 6);
	eth->proto = proto;
	if (hop_less(data + sizeof(*eth), end, proto))
		return TC_ACT_SHOT;

	n = bpf_map_lookup_elem(&counters, &to->overlay);
	if (n) {
		n->in_packets += packets;
		n->in_bytes += skb->len;
	}
	return bpf_redirect_peer(to->ifindex, 0);
}

/* deliver strips the outer headers and gives a packet to its container. */
static __always_inline int deliver(struct __sk_buff *skb, const struct attachment *to, int room,
				   const struct packet *p, int summed, int congested)
{
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET;
	__u32 packets = segments(skb), mtu = 0;

	/* Not 0: the interface has gone, or is too small. */
	if (bpf_check_mtu(skb, to->ifindex, &mtu, -room, 0))
		return TC_ACT_UNSPEC;
	if (room == ROOM4 && p->proto == htons(ETH_P_IPV6))
		flags |= BPF_F_ADJ_ROOM_DECAP_L3_IPV6;
	if (room == ROOM6 && p->proto == htons(ETH_P_IP))
		flags |= BPF_F_ADJ_ROOM_DECAP_L3_IPV4;
	if (bpf_skb_adjust_room(skb, -room, BPF_ADJ_ROOM_MAC, flags))
		return TC_ACT_UNSPEC;
	/* The outer checksum was the first of those that the network card checked. */
	if (summed)
		bpf_csum_level(skb, BPF_CSUM_LEVEL_DEC);
	if (congested)
		bpf_skb_ecn_set_ce(skb);
	return give(skb, to, p->proto, packets);
}

/* The headers of a packet without a tunnel. */
#define PLAIN_HEADERS (sizeof(struct eth) + sizeof(struct ip6) + 20)

/* take_plain takes a packet that a peer on the link sent as it is: from one of its
 * subnets, to a container of the same overlay. Who else sends so is left to the
 * firewall, which knows the devices. */
static __always_inline int take_plain(struct __sk_buff *skb, const struct host *h)
{
	void *data, *end;
	__u32 mtu = 0, bytes = skb->len - sizeof(struct eth);
	struct attachment *to;
	struct packet p = {};
	struct overlay *o;

	if (!h->direct || skb->ifindex != h->uplink)
		return TC_ACT_UNSPEC;
	if (bpf_skb_pull_data(skb, skb->len < PLAIN_HEADERS ? skb->len : PLAIN_HEADERS))
		return TC_ACT_UNSPEC;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (h->family == AF_INET) {
		struct ip4 *ip = data + sizeof(struct eth);
		struct prefix4 from = { 32 };
		__u32 key;

		if ((void *)(ip + 1) > end)
			return TC_ACT_UNSPEC;
		key = ip->dst;
		from.addr = ip->src;
		to = bpf_map_lookup_elem(&containers4, &key);
		o = to ? overlay_of(to) : NULL;
		if (!o || (ip->src & o->mask4) != o->net4 || !bpf_map_lookup_elem(&peers4, &from) ||
		    !plain4(ip, end, bytes, &p))
			return TC_ACT_UNSPEC;
	} else {
		struct ip6 *ip = data + sizeof(struct eth);
		struct prefix6 from = { 128 };
		__u32 key[4];

		if ((void *)(ip + 1) > end)
			return TC_ACT_UNSPEC;
		memcpy(key, ip->dst, sizeof(key));
		memcpy(from.addr, ip->src, sizeof(from.addr));
		to = bpf_map_lookup_elem(&containers6, key);
		o = to ? overlay_of(to) : NULL;
		if (!o || !inside6(ip->src, o->net6, o->mask6) || !bpf_map_lookup_elem(&peers6, &from) ||
		    !plain6(ip, end, bytes, &p))
			return TC_ACT_UNSPEC;
	}
	if (bpf_check_mtu(skb, to->ifindex, &mtu, 0, 0))
		return TC_ACT_UNSPEC;
	return give(skb, to, p.proto, segments(skb));
}

/* decapsulate takes what is in a VXLAN packet from a peer. */
static __always_inline int decapsulate(struct __sk_buff *skb, const struct host *h, struct tunnel *t, void *end,
				       int room, __u8 outer_class)
{
	void *inner = t + 1;
	__u32 bytes = skb->len - sizeof(struct eth) - room;
	struct packet p = {};
	struct attachment *to;
	struct overlay *o;

	if (!same_mac(t->inner.dst, h->vtep_mac))
		return TC_ACT_UNSPEC;
	if (t->inner.proto == htons(ETH_P_IP)) {
		struct ip4 *ip = inner;
		__u32 key;

		if ((void *)(ip + 1) > end)
			return TC_ACT_UNSPEC;
		key = ip->dst;
		to = bpf_map_lookup_elem(&containers4, &key);
		o = to ? overlay_of(to) : NULL;
		if (!o || (ip->src & o->mask4) != o->net4 || !plain4(ip, end, bytes, &p))
			return TC_ACT_UNSPEC;
	} else if (t->inner.proto == htons(ETH_P_IPV6)) {
		struct ip6 *ip = inner;
		__u32 key[4];

		if ((void *)(ip + 1) > end)
			return TC_ACT_UNSPEC;
		memcpy(key, ip->dst, sizeof(key));
		to = bpf_map_lookup_elem(&containers6, key);
		o = to ? overlay_of(to) : NULL;
		if (!o || !inside6(ip->src, o->net6, o->mask6) || !plain6(ip, end, bytes, &p))
			return TC_ACT_UNSPEC;
	} else {
		return TC_ACT_UNSPEC;
	}
	/* The container would take a batch of datagrams apart as a tunnel's. */
	if (skb->gso_size && p.transport != IPPROTO_TCP)
		return TC_ACT_UNSPEC;
	/* A packet that cannot carry the mark must be dropped. */
	if ((outer_class & ECN_MASK) == ECN_CE && !(p.class & ECN_MASK))
		return TC_ACT_UNSPEC;
	return deliver(skb, to, room, &p, t->udp.check != 0, (outer_class & ECN_MASK) == ECN_CE);
}

/* More than the headers of a tunnel and of the packet in it. */
#define HEADERS (sizeof(struct frame6) + sizeof(struct ip6) + 20)

SEC("tc")
int enter_host(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 from[4] = {};
	struct tunnel *t;
	struct host *h;
	__u8 class;
	int room;

	if (skb->pkt_type != PACKET_HOST || skb->vlan_present)
		return TC_ACT_UNSPEC;
	h = configured();
	if (!h)
		return TC_ACT_UNSPEC;
	/* Only VXLAN, and what is not for this host itself, pays for the rest. */
	if (skb->protocol == htons(ETH_P_IP)) {
		struct frame4 *f = data;

		if ((void *)(&f->ip + 1) > end)
			return TC_ACT_UNSPEC;
		if (h->direct && h->family == AF_INET && f->ip.dst != h->local[0])
			return take_plain(skb, h);
		if (f->ip.proto != IPPROTO_UDP)
			return TC_ACT_UNSPEC;
	} else if (skb->protocol == htons(ETH_P_IPV6)) {
		struct frame6 *f = data;

		if ((void *)(&f->ip + 1) > end)
			return TC_ACT_UNSPEC;
		if (h->direct && h->family == AF_INET6 && !same_ip6(f->ip.dst, h->local))
			return take_plain(skb, h);
		if (f->ip.proto != IPPROTO_UDP)
			return TC_ACT_UNSPEC;
	} else {
		return TC_ACT_UNSPEC;
	}
	if (data + HEADERS > end) {
		/* The rest may lie in a fragment of the buffer. */
		if (bpf_skb_pull_data(skb, skb->len < HEADERS ? skb->len : HEADERS))
			return TC_ACT_UNSPEC;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
	}

	if (skb->protocol == htons(ETH_P_IP)) {
		struct frame4 *f = data;

		if (data + sizeof(*f) > end || f->ip.vihl != 0x45 || f->ip.frag & htons(IP_MF_OFFSET) ||
		    h->family != AF_INET || f->ip.dst != h->local[0])
			return TC_ACT_UNSPEC;
		from[0] = f->ip.src;
		class = f->ip.tos;
		room = ROOM4;
		t = &f->tunnel;
	} else {
		struct frame6 *f = data;

		if (data + sizeof(*f) > end || h->family != AF_INET6 || !same_ip6(f->ip.dst, h->local))
			return TC_ACT_UNSPEC;
		memcpy(from, f->ip.src, sizeof(from));
		class = class6(&f->ip);
		room = ROOM6;
		t = &f->tunnel;
	}
	if (t->udp.dst != htons(VXLAN_PORT) || t->flags != htonl(VXLAN_FLAGS) || t->vni != htonl(VXLAN_VNI << 8))
		return TC_ACT_UNSPEC;
	if (!bpf_map_lookup_elem(&senders, from))
		return TC_ACT_UNSPEC;
	return decapsulate(skb, h, t, end, room, class);
}

char _license[] SEC("license") = "GPL";
