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

static __always_inline __u32 generation(void)
{
	__u32 zero = 0, *g = bpf_map_lookup_elem(&generations, &zero);

	return g ? *g : 0;
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

static __always_inline void write_tunnel(struct tunnel *t, const struct host *h, const struct way *w, __u32 length)
{
	struct eth *inner = (void *)(t + 1);

	t->udp.src = w->port;
	t->udp.dst = htons(VXLAN_PORT);
	t->udp.len = htons(length + sizeof(*t) + sizeof(*inner));
	t->udp.check = 0;
	t->flags = htonl(VXLAN_FLAGS);
	t->vni = htonl(VXLAN_VNI << 8);
	memcpy(inner->dst, w->to.vtep_mac, 6);
	memcpy(inner->src, h->vtep_mac, 6);
	inner->proto = w->proto;
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

/* hand_on gives a packet to the next hop of its way. The first of a way goes
 * through the kernel's neighbour, so that its entry is kept and probed as for any
 * other user; the others get the MACs that were found with the way. */
static __always_inline int hand_on(struct __sk_buff *skb, const struct way *w, int first)
{
	struct bpf_redir_neigh hop = { .nh_family = w->family };
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	/* The queue was chosen on the container's interface, which has one. */
	skb->queue_mapping = 0;
	if (!first && data + sizeof(struct eth) <= end) {
		memcpy(data, w->hop_macs, sizeof(w->hop_macs));
		return bpf_redirect(w->out, 0);
	}
	memcpy(hop.nh, w->hop, sizeof(hop.nh));
	return bpf_redirect_neigh(w->out, &hop, sizeof(hop), 0);
}

/* send_plain sends a packet to a peer on the link as it is. */
static __always_inline int send_plain(struct __sk_buff *skb, const struct way *w, int first)
{
	__u32 bytes = skb->len, packets = segments(skb);
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (hop_less(data + sizeof(struct eth), end, w->proto))
		return TC_ACT_UNSPEC;
	count_out(w->overlay, packets, bytes);
	return hand_on(skb, w, first);
}

#define ROOM_FLAGS                                                                                     \
	(BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_ENCAP_L2_ETH |        \
	 BPF_F_ADJ_ROOM_ENCAP_L2(sizeof(struct eth)))

/* encapsulate sends a packet to a peer. Until there is room for the outer
 * headers it may still be left to the kernel; after that it is ours. */
static __always_inline int encapsulate(struct __sk_buff *skb, const struct host *h, struct way *w, __u8 class, int first)
{
	__u32 bytes = skb->len, length = bytes - sizeof(struct eth), packets = segments(skb);
	void *data, *end;

	if (h->family == AF_INET) {
		struct ip4 *ip;

		if (bpf_skb_adjust_room(skb, ROOM4, BPF_ADJ_ROOM_MAC, ROOM_FLAGS | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4))
			return TC_ACT_UNSPEC;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		if (data + sizeof(struct frame4) > end)
			return TC_ACT_SHOT;
		((struct eth *)data)->proto = htons(ETH_P_IP);
		ip = data + sizeof(struct eth);
		ip->vihl = 0x45;
		ip->tos = ecn_outside(class);
		ip->len = htons(length + ROOM4);
		ip->id = w->id++;
		ip->frag = 0;
		ip->ttl = h->ttl;
		ip->proto = IPPROTO_UDP;
		ip->check = 0;
		ip->src = h->local[0];
		ip->dst = w->to.addr[0];
		ip->check = checksum4(ip);
		write_tunnel((void *)(ip + 1), h, w, length);
		if (hop_less(data + sizeof(struct frame4), end, w->proto))
			return TC_ACT_SHOT;
	} else {
		struct ip6 *ip;

		if (bpf_skb_adjust_room(skb, ROOM6, BPF_ADJ_ROOM_MAC, ROOM_FLAGS | BPF_F_ADJ_ROOM_ENCAP_L3_IPV6))
			return TC_ACT_UNSPEC;
		data = (void *)(long)skb->data;
		end = (void *)(long)skb->data_end;
		if (data + sizeof(struct frame6) > end)
			return TC_ACT_SHOT;
		((struct eth *)data)->proto = htons(ETH_P_IPV6);
		ip = data + sizeof(struct eth);
		ip->vcf = htonl(0x60000000 | (__u32)ecn_outside(class) << 20);
		ip->len = htons(length + ROOM6 - sizeof(*ip));
		ip->proto = IPPROTO_UDP;
		ip->ttl = h->ttl;
		memcpy(ip->src, h->local, sizeof(ip->src));
		memcpy(ip->dst, w->to.addr, sizeof(ip->dst));
		write_tunnel((void *)(ip + 1), h, w, length);
		if (hop_less(data + sizeof(struct frame6), end, w->proto))
			return TC_ACT_SHOT;
	}

	count_out(w->overlay, packets, bytes);
	return hand_on(skb, w, first);
}

/* send_near hands a packet of size bytes to a container of this host. */
static __always_inline int send_near(struct __sk_buff *skb, const struct way *w, __u32 size)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 mtu = 0;
	struct traffic *n;

	/* Not 0: the interface has gone, or is too small. */
	if (bpf_check_mtu(skb, w->out, &mtu, 0, 0) || size > mtu)
		return TC_ACT_UNSPEC;
	if (data + sizeof(struct eth) > end || hop_less(data + sizeof(struct eth), end, w->proto))
		return TC_ACT_UNSPEC;
	memcpy(data, w->hop_macs, sizeof(w->hop_macs));
	n = bpf_map_lookup_elem(&counters, &w->overlay);
	if (n) {
		n->near_packets += segments(skb);
		n->near_bytes += skb->len;
	}
	return bpf_redirect_peer(w->out, 0);
}

/* remembered says whether a way is that of the flow of a packet, found in the
 * maps as they are and in routes that are not old. */
static __always_inline int remembered(const struct way *w, __u32 now, __u32 ifindex, const struct eth *eth, void *end,
				      __u16 port)
{
	void *ip = (void *)(eth + 1);

	if (w->generation != now || w->ifindex != ifindex || w->port != port || w->proto != eth->proto ||
	    !same_mac(w->macs, eth->dst) || !same_mac(w->macs + 6, eth->src))
		return 0;
	if (eth->proto == htons(ETH_P_IP)) {
		if (w->src[0] != ((struct ip4 *)ip)->src || w->dst[0] != ((struct ip4 *)ip)->dst)
			return 0;
	} else if (ip + sizeof(struct ip6) > end || !same_ip6(w->src, ((struct ip6 *)ip)->src) ||
		   !same_ip6(w->dst, ((struct ip6 *)ip)->dst)) {
		return 0;
	}
	return bpf_ktime_get_coarse_ns() < w->until;
}

/* note_flow notes which flow a way is of; its addresses are there already. */
static __always_inline void note_flow(struct way *w, __u32 ifindex, const struct eth *eth, __u16 port, __u32 overlay)
{
	w->ifindex = ifindex;
	w->until = bpf_ktime_get_coarse_ns() + WAY_LASTS;
	memcpy(w->macs, eth, sizeof(w->macs));
	w->proto = eth->proto;
	w->port = port;
	w->overlay = overlay;
}

/* remember notes the way of a flow to a peer. */
static __always_inline void remember(struct way *w, __u32 now, const struct peer *to, const struct bpf_fib_lookup *way)
{
	w->to = *to;
	w->near = 0;
	w->out = way->ifindex;
	w->family = way->family;
	memcpy(w->hop, way->dst, sizeof(w->hop));
	memcpy(w->hop_macs, way->dmac, 6);
	memcpy(w->hop_macs + 6, way->smac, 6);
	w->mtu = way->tot_len;
	w->id = bpf_get_prandom_u32();
	w->on_link = way->family == AF_INET ? way->dst[0] == to->addr[0] : same_ip6(way->dst, to->addr);
	w->generation = now;
}

/* near notes the way to a container of the same overlay on this host, which is
 * behind another bridge, if it has the fast path as well. */
static __always_inline int near(const struct attachment *a, const struct eth *eth, struct way *w)
{
	struct attachment *to;

	if (eth->proto == htons(ETH_P_IP))
		to = bpf_map_lookup_elem(&containers4, w->dst);
	else
		to = bpf_map_lookup_elem(&containers6, w->dst);
	/* What it says to itself by way of the gateway is the kernel's. */
	if (!to || to->overlay != a->overlay || to->ifindex == a->ifindex)
		return 0;
	w->near = 1;
	w->out = to->ifindex;
	memcpy(w->hop_macs, to->mac, 6);
	memcpy(w->hop_macs + 6, to->gateway, 6);
	return 1;
}

/* What find answers besides 0, found. */
#define NOT_FOR_A_PEER 1
#define FOR_A_PEER 2 /* but it has to go the customary way */

/* find looks for the way of a packet of size bytes on the other side of the
 * outer headers, and notes it. */
static __always_inline int find(struct __sk_buff *skb, const struct host *h, struct way *w, __u32 now, struct eth *eth,
				void *end, __u16 port, __u32 size, int plain, __u32 *overlay)
{
	struct bpf_fib_lookup way = {};
	__u32 ifindex = skb->ifindex;
	struct attachment *a;
	struct overlay *o;
	struct peer *to;

	a = bpf_map_lookup_elem(&links, &ifindex);
	if (!a || !same_mac(eth->src, a->mac) || !same_mac(eth->dst, a->gateway))
		return NOT_FOR_A_PEER;
	o = overlay_of(a);
	if (!o)
		return NOT_FOR_A_PEER;
	*overlay = a->overlay;
	w->generation = 0; /* until all of it is there */
	if (eth->proto == htons(ETH_P_IP)) {
		struct ip4 *ip = (void *)(eth + 1);
		struct prefix4 key = { 32, ip->dst };

		if (!a->addr4 || ip->src != a->addr4 || (ip->dst & o->mask4) != o->net4)
			return NOT_FOR_A_PEER;
		to = bpf_map_lookup_elem(&peers4, &key);
		w->src[0] = ip->src;
		w->dst[0] = ip->dst;
	} else {
		struct ip6 *ip = (void *)(eth + 1);
		struct prefix6 key = { 128 };

		if ((void *)(ip + 1) > end || !given6(a->addr6) || !same_ip6(ip->src, a->addr6) ||
		    !inside6(ip->dst, o->net6, o->mask6))
			return NOT_FOR_A_PEER;
		memcpy(key.addr, ip->dst, sizeof(key.addr));
		to = bpf_map_lookup_elem(&peers6, &key);
		memcpy(w->src, ip->src, sizeof(w->src));
		memcpy(w->dst, ip->dst, sizeof(w->dst));
	}
	if (!to) {
		if (!plain || !near(a, eth, w))
			return NOT_FOR_A_PEER;
		note_flow(w, ifindex, eth, port, a->overlay);
		w->generation = now;
		return 0;
	}
	if (!plain || route(skb, h, to, size, port, &way))
		return FOR_A_PEER;
	note_flow(w, ifindex, eth, port, a->overlay);
	remember(w, now, to, &way);
	return 0;
}

SEC("tc")
int leave_container(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 bytes = skb->len, length = bytes - sizeof(struct eth), packets = segments(skb);
	__u32 hash, slot, now, size, overlay = 0;
	int verdict = TC_ACT_UNSPEC, plain, first = 0;
	struct packet p = {};
	struct eth *eth = data;
	struct traffic *n;
	struct host *h;
	struct way *w;
	__u16 port;

	if (data + sizeof(*eth) + sizeof(struct ip4) > end || skb->vlan_present)
		return TC_ACT_UNSPEC;
	if (eth->proto == htons(ETH_P_IP)) {
		struct ip4 *ip = data + sizeof(*eth);

		plain = plain4(ip, end, length, &p);
		hash = skb->hash ? skb->hash : flow_hash(ip->src, ip->dst, p.ports, p.transport);
	} else if (eth->proto == htons(ETH_P_IPV6) && data + sizeof(*eth) + sizeof(struct ip6) <= end) {
		struct ip6 *ip = data + sizeof(*eth);

		plain = plain6(ip, end, length, &p);
		hash = skb->hash ? skb->hash : flow_hash(ip->src[1] ^ ip->src[2] ^ ip->src[3], ip->dst[1] ^ ip->dst[2] ^ ip->dst[3], p.ports, p.transport);
	} else {
		return TC_ACT_UNSPEC;
	}
	h = configured();
	if (!h)
		return TC_ACT_UNSPEC;
	now = generation();
	slot = hash & (FLOWS - 1);
	/* As the kernel chooses a tunnel's source port. */
	hash ^= hash << 16;
	port = htons(h->port_low + (__u16)(((__u64)hash * h->port_span) >> 32));
	size = (skb->gso_size ? p.headers + skb->gso_size : length) + (h->family == AF_INET ? ROOM4 : ROOM6);

	w = bpf_map_lookup_elem(&ways, &slot);
	if (!w)
		return TC_ACT_UNSPEC;
	if (!plain || !remembered(w, now, skb->ifindex, eth, end, port)) {
		switch (find(skb, h, w, now, eth, end, port, size, plain, &overlay)) {
		case NOT_FOR_A_PEER:
			return TC_ACT_UNSPEC;
		case FOR_A_PEER:
			goto passed;
		}
		first = 1;
	}
	if (w->near)
		return send_near(skb, w, size - (h->family == AF_INET ? ROOM4 : ROOM6));
	overlay = w->overlay;
	/* The kernel tells a sender that its packet is too big. */
	if (size <= w->mtu && (!w->to.mtu || size - (h->family == AF_INET ? ROOM4 : ROOM6) <= w->to.mtu)) {
		if (w->to.direct && w->on_link && (w->proto == htons(ETH_P_IP)) == (h->family == AF_INET))
			verdict = send_plain(skb, w, first);
		else
			verdict = encapsulate(skb, h, w, p.class, first);
	}
	if (verdict != TC_ACT_UNSPEC)
		return verdict;
passed:
	n = bpf_map_lookup_elem(&counters, &overlay);
	if (n) {
		n->passed_out_packets += packets;
		n->passed_out_bytes += bytes;
	}
	return TC_ACT_UNSPEC;
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

/* receiver finds who a packet with the headers at ip is for, and notes it: a
 * container, if the packet is from its overlay and from a peer. from is the peer's
 * address outside of the tunnel, all zeros without one. */
static __always_inline struct attachment *receiver(__u32 slot, const __u32 *from, __u16 proto, void *ip, void *end)
{
	__u32 now = generation();
	struct attachment *to;
	struct receipt *r;
	struct overlay *o;
	void *sender;

	slot &= FLOWS - 1;
	r = bpf_map_lookup_elem(&receipts, &slot);
	if (!r)
		return NULL;
	if (proto == htons(ETH_P_IP)) {
		struct ip4 *ip4 = ip;
		struct prefix4 key = { 32 };
		__u32 dst;

		if (ip + sizeof(*ip4) > end)
			return NULL;
		if (r->generation == now && r->proto == proto && same_ip6(r->from, from) && r->src[0] == ip4->src &&
		    r->dst[0] == ip4->dst)
			return &r->to;
		dst = ip4->dst;
		key.addr = ip4->src;
		to = bpf_map_lookup_elem(&containers4, &dst);
		o = to ? overlay_of(to) : NULL;
		if (!o || (ip4->src & o->mask4) != o->net4)
			return NULL;
		sender = given6(from) ? bpf_map_lookup_elem(&senders, from) : bpf_map_lookup_elem(&peers4, &key);
		r->generation = 0; /* until all of it is there */
		r->src[0] = key.addr;
		r->dst[0] = dst;
	} else if (proto == htons(ETH_P_IPV6)) {
		struct ip6 *ip6 = ip;
		struct prefix6 key = { 128 };
		__u32 dst[4];

		if (ip + sizeof(*ip6) > end)
			return NULL;
		if (r->generation == now && r->proto == proto && same_ip6(r->from, from) && same_ip6(r->src, ip6->src) &&
		    same_ip6(r->dst, ip6->dst))
			return &r->to;
		memcpy(dst, ip6->dst, sizeof(dst));
		memcpy(key.addr, ip6->src, sizeof(key.addr));
		to = bpf_map_lookup_elem(&containers6, dst);
		o = to ? overlay_of(to) : NULL;
		if (!o || !inside6(ip6->src, o->net6, o->mask6))
			return NULL;
		sender = given6(from) ? bpf_map_lookup_elem(&senders, from) : bpf_map_lookup_elem(&peers6, &key);
		r->generation = 0;
		memcpy(r->src, key.addr, sizeof(r->src));
		memcpy(r->dst, dst, sizeof(r->dst));
	} else {
		return NULL;
	}
	if (!sender)
		return NULL;
	r->proto = proto;
	memcpy(r->from, from, sizeof(r->from));
	r->to = *to;
	r->generation = now;
	return &r->to;
}

/* pass_in counts a packet of a peer that the kernel is to deliver. */
static __always_inline int pass_in(struct __sk_buff *skb, const struct attachment *to, __u32 bytes)
{
	struct traffic *n = bpf_map_lookup_elem(&counters, &to->overlay);

	if (n) {
		n->passed_in_packets += segments(skb);
		n->passed_in_bytes += bytes;
	}
	return TC_ACT_UNSPEC;
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

/* What of an IP packet has to lie in front of the buffer's fragments: its own
 * header and that of TCP. Not a byte more: payload would be copied, and a buffer
 * that the sender still holds as well. */
#define NEEDED4 (sizeof(struct ip4) + 20)
#define NEEDED6 (sizeof(struct ip6) + 20)

/* pull brings that many bytes in front of the fragments. */
static __always_inline int pull(struct __sk_buff *skb, __u32 needed)
{
	if ((void *)(long)skb->data + needed <= (void *)(long)skb->data_end)
		return 0;
	return bpf_skb_pull_data(skb, skb->len < needed ? skb->len : needed);
}

/* take_plain takes a packet that a peer on the link sent as it is: from one of its
 * subnets, to a container of the same overlay. Who else sends so is left to the
 * firewall, which knows the devices. */
static __always_inline int take_plain(struct __sk_buff *skb, const struct host *h)
{
	void *data, *end;
	__u32 mtu = 0, bytes = skb->len - sizeof(struct eth), slot;
	__u32 from[4] = {}; /* no tunnel */
	struct attachment *to;
	struct packet p = {};
	int plain;

	if (!h->direct || skb->ifindex != h->uplink)
		return TC_ACT_UNSPEC;
	if (pull(skb, sizeof(struct eth) + (h->family == AF_INET ? NEEDED4 : NEEDED6)))
		return TC_ACT_UNSPEC;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (h->family == AF_INET) {
		struct ip4 *ip = data + sizeof(struct eth);

		if ((void *)(ip + 1) > end)
			return TC_ACT_UNSPEC;
		plain = plain4(ip, end, bytes, &p);
		slot = ip->src ^ ip->dst;
	} else {
		struct ip6 *ip = data + sizeof(struct eth);

		if ((void *)(ip + 1) > end)
			return TC_ACT_UNSPEC;
		plain = plain6(ip, end, bytes, &p);
		slot = ip->src[3] ^ ip->dst[3];
	}
	/* The low bits of both are the last of their addresses. */
	slot = ntohl(slot);
	to = receiver(slot ^ slot >> 8, from, p.proto, data + sizeof(struct eth), end);
	if (!to)
		return TC_ACT_UNSPEC;
	if (!plain || bpf_check_mtu(skb, to->ifindex, &mtu, 0, 0))
		return pass_in(skb, to, skb->len);
	return give(skb, to, p.proto, segments(skb));
}

/* decapsulate takes what is in a VXLAN packet from a peer. */
static __always_inline int decapsulate(struct __sk_buff *skb, const struct host *h, const __u32 *from, struct tunnel *t,
				       void *end, int room, __u8 outer_class)
{
	struct eth *link = (void *)(t + 1);
	void *inner = link + 1;
	__u32 bytes = skb->len - sizeof(struct eth) - room;
	struct packet p = {};
	struct attachment *to;
	int verdict;

	if (!same_mac(link->dst, h->vtep_mac))
		return TC_ACT_UNSPEC;
	/* The sender made the port of the flow's hash. */
	to = receiver(ntohs(t->udp.src), from, link->proto, inner, end);
	if (!to)
		return TC_ACT_UNSPEC;
	if (link->proto == htons(ETH_P_IP)) {
		if (inner + sizeof(struct ip4) > end || !plain4(inner, end, bytes, &p))
			goto passed;
	} else if (inner + sizeof(struct ip6) > end || !plain6(inner, end, bytes, &p)) {
		goto passed;
	}
	/* The container would take a batch of datagrams apart as a tunnel's. */
	if (skb->gso_size && p.transport != IPPROTO_TCP)
		goto passed;
	/* A packet that cannot carry the mark must be dropped. */
	if ((outer_class & ECN_MASK) == ECN_CE && !(p.class & ECN_MASK))
		goto passed;
	verdict = deliver(skb, to, room, &p, t->udp.check != 0, (outer_class & ECN_MASK) == ECN_CE);
	if (verdict != TC_ACT_UNSPEC)
		return verdict;
passed:
	return pass_in(skb, to, skb->len - room);
}

/* pull_tunnel does it for what lies in a tunnel, if it is one. */
static __always_inline int pull_tunnel(struct __sk_buff *skb, __u32 outer)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + outer <= end && ((struct eth *)(data + outer) - 1)->proto == htons(ETH_P_IP))
		return pull(skb, outer + NEEDED4);
	return pull(skb, outer + NEEDED6);
}

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
		struct ip4 *ip = data + sizeof(struct eth);

		if ((void *)(ip + 1) > end)
			return TC_ACT_UNSPEC;
		if (h->direct && h->family == AF_INET && ip->dst != h->local[0])
			return take_plain(skb, h);
		if (ip->proto != IPPROTO_UDP)
			return TC_ACT_UNSPEC;
	} else if (skb->protocol == htons(ETH_P_IPV6)) {
		struct ip6 *ip = data + sizeof(struct eth);

		if ((void *)(ip + 1) > end)
			return TC_ACT_UNSPEC;
		if (h->direct && h->family == AF_INET6 && !same_ip6(ip->dst, h->local))
			return take_plain(skb, h);
		if (ip->proto != IPPROTO_UDP)
			return TC_ACT_UNSPEC;
	} else {
		return TC_ACT_UNSPEC;
	}
	if (skb->protocol == htons(ETH_P_IP) ? pull_tunnel(skb, sizeof(struct frame4)) : pull_tunnel(skb, sizeof(struct frame6)))
		return TC_ACT_UNSPEC;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;

	if (skb->protocol == htons(ETH_P_IP)) {
		struct ip4 *ip = data + sizeof(struct eth);

		if (data + sizeof(struct frame4) > end || ip->vihl != 0x45 || ip->frag & htons(IP_MF_OFFSET) ||
		    h->family != AF_INET || ip->dst != h->local[0])
			return TC_ACT_UNSPEC;
		from[0] = ip->src;
		class = ip->tos;
		room = ROOM4;
		t = (void *)(ip + 1);
	} else {
		struct ip6 *ip = data + sizeof(struct eth);

		if (data + sizeof(struct frame6) > end || h->family != AF_INET6 || !same_ip6(ip->dst, h->local))
			return TC_ACT_UNSPEC;
		memcpy(from, ip->src, sizeof(from));
		class = class6(ip);
		room = ROOM6;
		t = (void *)(ip + 1);
	}
	if (t->udp.dst != htons(VXLAN_PORT) || t->flags != htonl(VXLAN_FLAGS) || t->vni != htonl(VXLAN_VNI << 8))
		return TC_ACT_UNSPEC;
	return decapsulate(skb, h, from, t, end, room, class);
}

char _license[] SEC("license") = "GPL";
