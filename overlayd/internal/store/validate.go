package store

import (
	"errors"
	"fmt"
)

// What every implementation takes.
const (
	MaxKey   = 4 << 10 // bytes of a key
	MaxValue = 1 << 20 // bytes of a value
	// MaxOps is how many conditions, and how many operations, one transaction
	// may have. etcd takes 128 unless it is told otherwise.
	MaxOps = 120
)

// Validate refuses a transaction that some implementation would refuse.
func Validate(txn Txn) error {
	if len(txn.If) > MaxOps || len(txn.Then) > MaxOps {
		return fmt.Errorf("%d conditions and %d operations, at most %d of each fit", len(txn.If), len(txn.Then), MaxOps)
	}
	for _, cond := range txn.If {
		if cond.Key == "" {
			return errors.New("condition on an empty key")
		}
	}
	seen := make(map[string]bool, len(txn.Then))
	for _, op := range txn.Then {
		switch {
		case op.Key == "":
			return errors.New("empty key")
		case len(op.Key) > MaxKey:
			return fmt.Errorf("key of %d bytes, at most %d fit", len(op.Key), MaxKey)
		case len(op.Value) > MaxValue:
			return fmt.Errorf("key %q: value of %d bytes, at most %d fit", op.Key, len(op.Value), MaxValue)
		case seen[op.Key]:
			return fmt.Errorf("key %q is written twice", op.Key)
		}
		seen[op.Key] = true
	}
	return nil
}
