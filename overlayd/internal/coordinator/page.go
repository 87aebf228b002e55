package coordinator

import (
	"net/http"
	"slices"

	"overlayd.internal/overlay/overlayd/internal/page"
)

// withPage adds the page to the routes. It is for who may read; or, where it is
// public, for anybody, and with it what it reads.
func (c *Coordinator) withPage(routes []route) []route {
	to := reader
	if c.pagePublic {
		to = public
	}
	out := slices.Clone(routes)
	for i, r := range out {
		if r.method == http.MethodGet && slices.Contains(page.Reads(), r.path) {
			out[i].access = min(r.access, to)
		}
	}
	for _, r := range page.Routes() {
		out = append(out, route{r.Method, r.Path, to, r.Handler})
	}
	return out
}

// stranger is what somebody without an identity is told.
func stranger(r *http.Request) error {
	if page.Belongs(r.URL.Path) && r.Method == http.MethodGet {
		return refuse(http.StatusUnauthorized, "this coordinator serves those that have joined the cluster, with a certificate; to see the page in a browser: "+
			"overlayctl page, after overlayctl login --token TOKEN, or as root on a coordinator's host; a host joins with overlayd agent --join-token")
	}
	return refuse(http.StatusUnauthorized, "this coordinator serves those that have joined the cluster, with a certificate; "+
		"join with a token: overlayd agent --join-token for a host, overlayctl login --token for a person")
}
