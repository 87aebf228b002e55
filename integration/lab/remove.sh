# Removes the lab called $1, whose directory is $2: processes in its namespaces
# (killed by id), the namespaces, the directory. What is gone is fine. The lab's
# own process, whose id is in the name, may have a thread in there: it is spared.
own=${1#ovl}
own=${own%%.*}
for path in /run/netns/"$1"-*; do
	[ -e "$path" ] || continue
	for pid in $(ip netns pids "${path##*/}"); do
		[ "$pid" = "$own" ] || kill -KILL "$pid" 2>/dev/null
	done
done
for path in /run/netns/"$1"-*; do
	[ -e "$path" ] || continue
	ip netns delete "${path##*/}"
done
rm -rf "$2"
