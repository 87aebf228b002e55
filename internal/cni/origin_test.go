package cni

import (
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
)

// TestOrigin: who has a container, and what it is called there, by what the runtimes
// say in fact; the engines' tests look at the real ones.
func TestOrigin(t *testing.T) {
	info, labelled := &conf.MesosNetworkInfo{Name: "dcos"}, &conf.MesosNetworkInfo{Name: "dcos"}
	info.Labels.Labels = []conf.MesosLabel{{Key: "names", Value: "no"}}
	labelled.Labels.Labels = []conf.MesosLabel{{Key: "app", Value: "a"}, {Key: "name", Value: "web.prod"}, {Key: "name", Value: "second"}}
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
		{"nerdctl, a host name of its own making", "NERDCTL_CNI_DHCP_HOSTNAME=4f1d2a90c3b7;IgnoreUnknown=1", "/proc/77/ns/net", "nerdctl", nil, conf.Origin{Runtime: "containerd"}},
		{"nerdctl --hostname", "NERDCTL_CNI_DHCP_HOSTNAME=web;IgnoreUnknown=1", "/proc/77/ns/net", "nerdctl", nil, conf.Origin{Runtime: "containerd", Name: "web"}},
		{"Mesos, by its arguments", "", "/x", "sh", info, conf.Origin{Runtime: "mesos"}},
		{"Mesos, a task with a label", "", "/x", "sh", labelled, conf.Origin{Runtime: "mesos", Name: "web.prod"}},
		{"Mesos, by its namespace", "", "/run/mesos/isolators/network/cni/u/ns", "sh", nil, conf.Origin{Runtime: "mesos"}},
		{"who knows", "K8S_POD_NAME=web", "/run/netns/x", "bash", nil, conf.Origin{Name: "web"}},
		{"nothing to see", "", "/run/netns/x", "", nil, conf.Origin{}},
	} {
		c := &Call{ContainerID: "default-4f1d2a90c3b7e5", NetNS: tt.netns, Args: parseArgs(tt.args)}
		c.Conf.Args.Mesos.NetworkInfo = tt.mesos
		if got := originOf(c, func() string { return tt.parent }); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
	if got := parentName(); got == "" || len(got) > 15 || strings.ContainsAny(got, "\n\x00") {
		t.Errorf("who runs the test is called %q", got)
	}
}
