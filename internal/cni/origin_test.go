package cni

import (
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
)

// TestOrigin: who has a container, and what it is called there, by what the runtimes
// say in fact; the engines' tests look at the real ones.
func TestOrigin(t *testing.T) {
	info := &conf.MesosNetworkInfo{Name: "dcos"}
	for _, tt := range []struct {
		name, args, netns, parent string
		mesos                     *conf.MesosNetworkInfo
		want                      conf.Origin
	}{
		{"podman", "IgnoreUnknown=1;K8S_POD_NAMESPACE=web;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=aa", "/run/netns/netns-1", "podman", nil, conf.Origin{Runtime: "podman", Name: "web"}},
		{"containerd by its interface", "IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web-0;K8S_POD_UID=u", "/var/run/netns/cni-1", "containerd", nil, conf.Origin{Runtime: "containerd", Name: "prod/web-0"}},
		{"CRI-O", "K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web-0", "/var/run/netns/x", "crio", nil, conf.Origin{Runtime: "cri-o", Name: "prod/web-0"}},
		{"ctr", "", "/proc/77/ns/net", "ctr", nil, conf.Origin{Runtime: "containerd"}},
		{"nerdctl", "IgnoreUnknown=1", "/proc/77/ns/net", "nerdctl", nil, conf.Origin{Runtime: "containerd"}},
		{"Mesos, by its arguments", "", "/x", "sh", info, conf.Origin{Runtime: "mesos"}},
		{"Mesos, by its namespace", "", "/run/mesos/isolators/network/cni/u/ns", "sh", nil, conf.Origin{Runtime: "mesos"}},
		{"who knows", "K8S_POD_NAME=web", "/run/netns/x", "bash", nil, conf.Origin{Name: "web"}},
		{"nothing to see", "", "/run/netns/x", "", nil, conf.Origin{}},
	} {
		c := &Call{NetNS: tt.netns, Args: parseArgs(tt.args)}
		c.Conf.Args.Mesos.NetworkInfo = tt.mesos
		if got := originOf(c, func() string { return tt.parent }); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
	if got := parentName(); got == "" || len(got) > 15 || strings.ContainsAny(got, "\n\x00") {
		t.Errorf("who runs the test is called %q", got)
	}
}
