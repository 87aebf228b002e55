// Package engines runs real container engines, several hosts of them on one
// machine, and launches containers through them.
//
// A Lab is an underlay with hosts on it:
//
//	 lan: bridge lan0 198.51.100.1, fd00:c0de::1; outside 203.0.113.1, 2001:db8:aa::1
//	   |            |            |
//	eth0 of h1   eth0 of h2   eth0 of h3 ...
//
// Each of them, lan included, is a Host: an init of its own in fresh network,
// mount, UTS, IPC and process namespaces. /run is a tmpfs, /etc, /opt and
// /var/lib are layers over the machine's, so the engines find and leave
// everything where they always do and never meet their namesakes on another
// host. Killing the init kills every process of the host: a crash; booting it
// again with the same layers is a reboot.
//
// The cgroup hierarchies are the machine's (an engine on cgroup v1 cannot work
// in a cgroup namespace): whatever is made there has the host's ID in its name
// and is removed with it.
//
// Everything belongs to the process that called New. If that is killed, the
// inits die with it, because each ends with its standard input, and the next New removes
// the rest.
package engines
