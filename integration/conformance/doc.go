// Package conformance tests the CNI programs against the CNI specification 1.1.0,
// its conventions, and what real runtimes do and need: one named test for each
// line of a list, for each program. `make conformance` prints the list with
// results and writes docs/conformance.md from it.
//
// The programs are the real ones, on a host of the lab with a real coordinator
// and agent. After every test `overlayctl ipam check` has to find that address
// stores, kernel and lease agree.
package conformance
