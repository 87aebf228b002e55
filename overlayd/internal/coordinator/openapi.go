package coordinator

import (
	"net/http"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/api/openapi"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// accessNames are how the description calls who a route is for.
var accessNames = [...]string{public: "public", member: "any identity", reader: "reader", operator: "operator", self: "agent, for itself",
	fellow: "operator, or another coordinator", relayed: "agent, for itself, or another coordinator"}

// withDescription adds the route that describes all of them.
func (c *Coordinator) withDescription(routes []route) []route {
	describe := func(w http.ResponseWriter, _ *http.Request) error {
		document, err := openapi.Document(c.version, func(method, path string) string { return accessOf(routes, method, path) })
		if err != nil {
			return err
		}
		serve.WriteDocument(w, http.StatusOK, document)
		return nil
	}
	routes = append(routes, route{http.MethodGet, api.PathOpenAPI, member, describe})
	return routes
}

// accessOf says who a route is for; empty: it is not served here.
func accessOf(routes []route, method, path string) string {
	for _, r := range routes {
		if r.method == method && r.path == path {
			return accessNames[r.access]
		}
	}
	return ""
}
