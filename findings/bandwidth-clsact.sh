#!/usr/bin/env bash
# containernetworking/plugins 1.9.1 (bandwidth), Linux 6.18, iproute2 6.1: where the host
# end of a container's interface has the qdisc clsact, as what attaches eBPF programs by
# cls_bpf has put it there, the CNI plugin bandwidth refuses a container with an
# egressRate: "create ingress qdisc: file exists". It adds the qdisc ingress, which stands
# in clsact's place and takes the same filters. Expected: it uses the clsact that is there,
# or says what is in its way. With an ingressRate alone it succeeds. Without clsact both do.
# A container that the runtime wants held to a rate gets no clsact from us, and goes the
# kernel's way (conf.NetConf.Shaped, plugins/internal/attach). Needs root and Go.
set -euo pipefail
if [ "${1-}" != inside ]; then
	uname -r
	tc -V
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	cd "$work"
	go mod init finding >/dev/null 2>&1
	go get github.com/containernetworking/plugins/plugins/meta/bandwidth@v1.9.1 >/dev/null 2>&1
	go build -o bandwidth github.com/containernetworking/plugins/plugins/meta/bandwidth
	unshare --net --mount "$OLDPWD/$0" inside "$work/bandwidth"
	exit
fi
plugin=$2
mount -t tmpfs none /run
mkdir /run/netns

# attach CLSACT RATES ID runs ADD for a new pair, and prints what comes of it.
attach() {
	ip netns add c
	ip link add host type veth peer name eth0 netns c
	ip link set host up
	ip -n c link set eth0 up
	if [ "$1" = clsact ]; then tc qdisc add dev host clsact; fi
	CNI_COMMAND=ADD CNI_CONTAINERID="$3" CNI_NETNS=/run/netns/c CNI_IFNAME=eth0 CNI_PATH=/ "$plugin" <<-END >/run/out 2>&1 && echo attached || grep -o '"msg": ".*"' /run/out
		{"cniVersion": "1.0.0", "name": "n", "type": "bandwidth", "runtimeConfig": {"bandwidth": {$2}},
		 "prevResult": {"cniVersion": "1.0.0", "interfaces": [{"name": "host"}, {"name": "eth0", "sandbox": "/run/netns/c"}], "ips": [{"interface": 1, "address": "10.0.0.2/24"}]}}
	END
	ip link delete host
	ip netns delete c
}

status=0
check() { # WHAT WANT CLSACT RATES
	got=$(attach "$3" "$4" "${1//[ ,]/}")
	echo "$1: $got"
	if [ "$got" != "$2" ]; then
		echo "changed: not $2" >&2
		status=1
	fi
}
egress='"egressRate": 1000000, "egressBurst": 100000'
check "egress, without clsact" attached none "$egress"
check "egress, with clsact" '"msg": "create ingress qdisc: file exists"' clsact "$egress"
check "ingress, with clsact" attached clsact '"ingressRate": 1000000, "ingressBurst": 100000'
exit $status
