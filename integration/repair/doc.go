// Package repair breaks a host in every way that is listed, while containers are
// talking, and measures how long it takes until the host is as it was and how many
// packets are lost until then. It knows the programs from outside: agents as users
// run them, faults as scripts, the kernel by its own tools.
package repair
