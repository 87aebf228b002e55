package store

import (
	"context"
	"time"
)

// Timed calls observe after every List ("list") and Commit ("commit") of s with
// how long it took, also when it failed.
func Timed(s Store, observe func(operation string, took time.Duration)) Store {
	return timed{s, observe}
}

type timed struct {
	Store
	observe func(string, time.Duration)
}

func (t timed) List(ctx context.Context, prefix string) ([]KV, uint64, error) {
	began := time.Now()
	defer func() { t.observe("list", time.Since(began)) }()
	return t.Store.List(ctx, prefix)
}

func (t timed) Commit(ctx context.Context, txn Txn) (uint64, error) {
	began := time.Now()
	defer func() { t.observe("commit", time.Since(began)) }()
	return t.Store.Commit(ctx, txn)
}
