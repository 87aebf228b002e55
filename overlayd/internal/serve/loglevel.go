package serve

import (
	"context"
	"net"
	"net/http"
	"os"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/logging"
)

// LogLevel serves the level of a log: what it is, and another one.
func LogLevel(level *logging.Level) (get, set Handler) {
	get = func(w http.ResponseWriter, _ *http.Request) error {
		WriteJSON(w, http.StatusOK, api.LogLevel{Level: level.String()})
		return nil
	}
	set = func(w http.ResponseWriter, r *http.Request) error {
		var req api.LogLevel
		if err := ReadJSON(w, r, &req); err != nil {
			return err
		}
		to, err := logging.ParseLevel(req.Level)
		if err != nil {
			return Refuse(http.StatusBadRequest, "level: %v", err)
		}
		level.Set(to)
		return get(w, r)
	}
	return get, set
}

type peerKey struct{}

// PeerConn remembers which user is at the other end of a unix socket. It is a
// ConnContext.
func PeerConn(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var cred *unix.Ucred
	if raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }) != nil || err != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, cred.Uid)
}

// ByRoot refuses requests but those of root, or of the user that the daemon runs
// as, over a unix socket. The server needs PeerConn.
func ByRoot(h Handler) Handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		if uid, ok := r.Context().Value(peerKey{}).(uint32); !ok || uid != 0 && int(uid) != os.Geteuid() {
			return Refuse(http.StatusForbidden, "%s %s is for root, over the socket", r.Method, r.URL.Path)
		}
		return h(w, r)
	}
}
