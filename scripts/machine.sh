# shellcheck shell=bash
# machine.sh: Debians that are made for a test and booted with systemd-nspawn. It is
# sourced, by packages and by readme, which set $name first and work in $work.

die() {
	printf '%s: %s\n' "$name" "$*" >&2
	exit 1
}
step() { printf '%4ds  %s\n' "$SECONDS" "$*"; }

# need TOOL=PACKAGE...: installs what is missing on this machine.
need() {
	local pair missing=()
	[ "$(id -u)" -eq 0 ] || die "must run as root: it boots systems of its own"
	for pair in "$@"; do
		command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	step "installing ${missing[*]}"
	{ apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "${missing[@]}"; } >/dev/null || die "apt-get could not install ${missing[*]}"
}

declare -A machines=() leaders=()

# power_off ends what boot began.
power_off() {
	local m
	for m in "${!machines[@]}"; do
		kill "${machines[$m]}" 2>/dev/null || true # SIGTERM: powers it off
	done
	for m in "${!machines[@]}"; do
		for _ in $(seq 50); do kill -0 "${machines[$m]}" 2>/dev/null || break; sleep 0.2; done
		kill -KILL "${machines[$m]}" 2>/dev/null || true
		wait "${machines[$m]}" 2>/dev/null || true
	done
	machines=()
}

cache=${CACHE:-${HOME:-/root}/.cache/overlay}
# shellcheck disable=SC1091
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")

# debian: the Debian that every machine is made of, in $base. It comes from the mirror
# that this machine's apt uses, once.
debian() {
	base=$cache/debian-$suite.tar
	[ ! -e "$base" ] || return 0
	local mirror
	mirror=$(apt-get indextargets --format '$(SITE) $(CODENAME)' | awk -v s="$suite" '$2 == s { print $1; exit }')
	[ -n "$mirror" ] || die "apt knows no mirror of $suite"
	step "making a Debian $suite; this takes minutes, once"
	mkdir -p "$cache"
	debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,udev,procps,kmod,iproute2,iptables,nftables,iputils-ping,ca-certificates \
		"$suite" "$work/made" "$mirror" >"$work/debootstrap.log" 2>&1 || { tail -20 "$work/debootstrap.log" >&2; die "debootstrap failed"; }
	rm -f "$work"/made/var/cache/apt/archives/*.deb
	tar --create --file "$base.new" --directory "$work/made" --one-file-system .
	mv "$base.new" "$base"
	rm -rf "$work/made"
}

# boot NAME ROOT [ARGUMENT...]: boots the directory ROOT, and waits until it is up.
boot() {
	local m=$1 root=$2
	shift 2
	rm -f "$root/etc/machine-id"
	# Nothing in there manages the network, which would be waited for.
	ln -sf /dev/null "$root/etc/systemd/system/systemd-networkd-wait-online.service"
	# The machine's devices have to be those of the unified or the hybrid hierarchy; the
	# container's systemd finds out by itself.
	systemd-nspawn --quiet --directory="$root" --machine="overlay-$m-$$" --hostname="$m" --boot --register=no --keep-unit \
		--link-journal=no --capability=CAP_NET_ADMIN,CAP_BPF,CAP_PERFMON "$@" </dev/null >"$work/console.$m" 2>&1 &
	machines[$m]=$!
	leaders[$m]=
	for _ in $(seq 300); do
		kill -0 "${machines[$m]}" 2>/dev/null || { cat "$work/console.$m" >&2; die "systemd-nspawn does not boot here"; }
		leaders[$m]=$(pgrep -x -P "${machines[$m]}" systemd | head -1 || true) # its other children end soon
		[ -n "${leaders[$m]}" ] && return
		sleep 0.2
	done
	die "machine $m does not begin"
}

# on NAME COMMAND...: runs a command in a machine; sh_on NAME SCRIPT: a script.
on() {
	local m=$1
	shift
	nsenter --target "${leaders[$m]}" --mount --uts --ipc --net --pid --cgroup --root --wdns=/root -- env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root "$@"
}
sh_on() { on "$1" sh -ec "$2"; }
booted() { sh_on "$1" 'case $(systemctl is-system-running) in running|degraded) ;; *) exit 1 ;; esac'; }

# until_ok SECONDS WHAT NAME COMMAND...: waits for a command to succeed; NAME is the
# machine whose journal tells why it did not.
until_ok() {
	local limit=$1 what=$2 m=$3 end=$((SECONDS + $1))
	shift 3
	until "$@" >"$work/out" 2>&1; do
		[ "$SECONDS" -lt "$end" ] || { cat "$work/out" >&2; sh_on "$m" 'journalctl --no-pager -n 60 2>&1 || true' >&2; die "still not after $limit s: $what"; }
		sleep 0.3
	done
}
