// Package fleet has only tests: a thousand simulated hosts with identities, on
// coordinators that are real processes, on either store.
package fleet
