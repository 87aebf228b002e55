// Package integration tests the programs from outside, as their users see them:
// real binaries, hosts as network namespaces, files and HTTP. It imports no
// package of the product.
package integration
