package docker

import (
	"testing"

	"overlayd.internal/overlay/conf"
)

// Teardown removes our networks and no others; one that a container is in only
// by force.
func TestTeardown(t *testing.T) {
	h := newHost(t)
	host := "unix://" + h.engine.path
	if n, users, err := Teardown(t.Context(), host, false); n != 0 || users != nil || err != nil {
		t.Errorf("without an engine: %d, %q, %v", n, users, err)
	}
	h.engine.start()
	h.run()
	h.engine.change(func() { h.engine.networks["x"] = network{ID: "x", Name: "theirs", Driver: "bridge"} })
	h.Set(leased(conf.Docker)[1:2], 1450)
	eventually(t, "networks", h.engine.names, []string{"dcos", "theirs"})
	h.Set(nil, 0) // the agent is stopped; it must not put it back
	eventually(t, "its network has gone", h.engine.names, []string{"theirs"})
	h.engine.change(func() {
		h.engine.networks["a"] = network{ID: "a", Name: "dcos", Driver: "bridge", Labels: map[string]string{label: "dcos"},
			Containers: map[string]endpoint{"c1": {Name: "web1"}}}
	})
	n, users, err := Teardown(t.Context(), host, false)
	if err != nil || n != 0 {
		t.Errorf("with a container: removed %d, %v", n, err)
	}
	equal(t, "users", users, []string{"container web1 (of docker network dcos)"})
	equal(t, "networks", h.engine.names(), []string{"dcos", "theirs"})
}
