// Package store is the seam between the coordinator and what keeps its data: a
// small transactional key-value store with revisions. Every change is one
// transaction, every transaction has the next revision, and whoever knows a
// revision can watch what came after it.
//
// store/bbolt keeps everything in one file for a single coordinator, store/etcd
// in an etcd cluster for any number of them.
// storetest holds the contract as a test that every implementation passes.
package store

import (
	"context"
	"errors"
)

// Errors a caller branches on.
var (
	// ErrConflict: a condition of the transaction did not hold; nothing was written.
	ErrConflict = errors.New("store: condition not met")
	// ErrCompacted: the revision to watch from is no longer remembered; list again.
	ErrCompacted = errors.New("store: revision no longer remembered")
	// ErrUnknown: the transaction may or may not have been written. Read to find out.
	ErrUnknown = errors.New("store: outcome of the transaction is unknown")
)

// KV is one stored key. Create and Mod are the revisions at which it was put
// first and last; a deleted key starts over.
type KV struct {
	Key         string
	Value       []byte
	Create, Mod uint64
}

// Cond holds when Key was last modified at revision Mod; Mod 0 means the key
// does not exist. With Prefix it holds when no key that begins with Key was
// modified after Mod; one that was deleted does not count.
type Cond struct {
	Key    string
	Mod    uint64
	Prefix bool
}

// Op puts Value at Key, or deletes Key.
type Op struct {
	Key    string
	Value  []byte
	Delete bool
}

// Txn writes all of Then if every condition of If holds, and nothing otherwise.
type Txn struct {
	If   []Cond
	Then []Op
}

// Event is one changed key. A deleted key has Delete set and no Value; Mod is
// the revision of the deletion.
type Event struct {
	KV
	Delete bool
}

// Store is safe for concurrent use.
type Store interface {
	// List returns the keys that begin with prefix in byte order, and the
	// revision the list is true at.
	List(ctx context.Context, prefix string) ([]KV, uint64, error)

	// Commit runs one transaction and returns its revision once it is durable.
	// It fails with ErrConflict or ErrUnknown as they say, or with another
	// error when nothing was written. A transaction without Then only checks, and
	// what it says was true at some moment during the call.
	Commit(ctx context.Context, txn Txn) (uint64, error)

	// Watch calls fn for every transaction after the given revision that
	// touched a key beginning with prefix, in order, each once, with its events
	// (only those of the prefix) and its revision. It returns when ctx is done
	// (ctx's error), when fn fails (fn's error), or with ErrCompacted.
	Watch(ctx context.Context, prefix string, after uint64, fn func(rev uint64, events []Event) error) error

	// Ready says, in a sentence for an operator, why nothing can be read or
	// written now, as far as that is known without asking; nil: it can.
	Ready(ctx context.Context) error

	// Close releases the store. Calls in progress end with an error.
	Close() error
}
