package coordinator

import (
	"errors"
	"fmt"
	"net/http"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// errStopping: Run has ended, or was never called.
var errStopping = errors.New("the coordinator is stopping")

// ErrMisfit is an error of New: the configuration was changed in a way that
// would take from agents what they have leased.
var ErrMisfit = errors.New("the configuration does not fit what is leased")

// refuse is an answer that says no. The message is for the person who reads the
// agent's log.
func refuse(code int, format string, args ...any) error {
	return serve.Refuse(code, format, args...)
}

// refuseKind is refuse of a conflict that the agent acts on.
func refuseKind(kind, format string, args ...any) error {
	return &api.Error{Code: http.StatusConflict, Kind: kind, Message: fmt.Sprintf(format, args...)}
}

func unknownAgent(id string) error {
	return refuse(http.StatusNotFound, "agent %s has no lease here; register first (POST %s)", id, api.PathRegister)
}
