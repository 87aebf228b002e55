package etcd

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// errNoSpace is what an operator reads while the quota is used up.
var errNoSpace = errors.New("etcd has used up its space quota and takes no writes (alarm NOSPACE); leases in use stay, nothing new can be leased; " +
	"compact and defragment it or raise --quota-backend-bytes, then run `etcdctl alarm disarm`")

// refused reports whether etcd has answered that it did not do what was asked,
// whatever is asked again.
func refused(err error) bool {
	for _, e := range []error{
		rpctypes.ErrNoSpace, rpctypes.ErrEmptyKey, rpctypes.ErrDuplicateKey, rpctypes.ErrTooManyOps,
		rpctypes.ErrRequestTooLarge, rpctypes.ErrCorrupt, rpctypes.ErrPermissionDenied, rpctypes.ErrUserEmpty,
		rpctypes.ErrAuthFailed, rpctypes.ErrInvalidAuthToken,
	} {
		if errors.Is(rpctypes.Error(err), e) {
			return true
		}
	}
	return false
}

// explain says what an error of etcd means to who operates it.
func explain(err error) error {
	switch e := rpctypes.Error(err); {
	case errors.Is(e, rpctypes.ErrNoSpace):
		return errNoSpace
	case errors.Is(e, rpctypes.ErrCorrupt):
		return fmt.Errorf("etcd has found its data damaged and takes no writes (alarm CORRUPT); see etcd's documentation on disaster recovery: %w", err)
	case errors.Is(e, rpctypes.ErrTooManyOps):
		return fmt.Errorf("a lease of so many overlays is more than etcd takes at once; start etcd with a larger --max-txn-ops: %w", err)
	case errors.Is(e, rpctypes.ErrUserEmpty), errors.Is(e, rpctypes.ErrPermissionDenied), errors.Is(e, rpctypes.ErrAuthFailed):
		return fmt.Errorf("etcd demands a user that may read and write the keys; give its client certificate with --store-cert and --store-key: %w", err)
	case errors.Is(e, rpctypes.ErrNoLeader), errors.Is(e, rpctypes.ErrTimeoutDueToLeaderFail), errors.Is(e, rpctypes.ErrTimeoutDueToConnectionLost),
		errors.Is(e, rpctypes.ErrTimeout), errors.Is(e, rpctypes.ErrLeaderChanged):
		return fmt.Errorf("etcd has no leader, so fewer than half of its members may be up: %w", err)
	case errors.Is(e, rpctypes.ErrGRPCNotSupportedForLearner):
		return fmt.Errorf("the member is a learner, which answers no questions: %w", err)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("no answer within %s: the member is down, cut off, or has no majority: %w", callTimeout, err)
	}
	return err
}
