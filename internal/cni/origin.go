package cni

import (
	"bytes"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// runtimesByProgram are the programs that call CNI programs, by what the kernel
// keeps of their names, which is the beginning.
var runtimesByProgram = [...]struct{ program, runtime string }{
	{"podman", conf.RuntimePodman},
	{"netavark", conf.RuntimePodman},
	{"containerd", conf.RuntimeContainerd},
	{"ctr", conf.RuntimeContainerd},
	{"nerdctl", conf.RuntimeContainerd},
	{"crio", conf.RuntimeCRIO},
	{"mesos-agent", conf.RuntimeMesos},
	{"mesos-slave", conf.RuntimeMesos},
}

// originOf tells whose container it is by what the runtime says, and else by which
// program called us. Only a runtime, which is root, can lie about that; nothing but
// what people are shown depends on it.
func originOf(c *Call, parent func() string) conf.Origin {
	a := c.Args
	if info := c.Conf.Args.Mesos.NetworkInfo; info != nil {
		return conf.Origin{Runtime: conf.RuntimeMesos, Name: info.Label(conf.MesosNameLabel)}
	}
	if strings.Contains(c.NetNS, "/isolators/network/cni/") {
		return conf.Origin{Runtime: conf.RuntimeMesos}
	}
	o := conf.Origin{Name: a.PodName}
	// nerdctl says the host name, which is the beginning of the id unless one was given.
	if a.PodName == "" && !strings.Contains(c.ContainerID, a.Hostname) {
		o.Name = a.Hostname
	}
	program := parent()
	for _, r := range runtimesByProgram {
		if program == r.program {
			o.Runtime = r.runtime
		}
	}
	// Podman gives a container's name twice.
	if a.PodName != "" && a.PodNamespace != "" && a.PodNamespace != a.PodName {
		o.Name = a.PodNamespace + "/" + a.PodName
	}
	return o
}

// parentName is what the kernel calls the program that called us; empty where that
// is out of sight.
func parentName() string {
	fd, err := unix.Open("/proc/"+strconv.Itoa(unix.Getppid())+"/comm", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(fd)
	var b [32]byte
	n, err := unix.Read(fd, b[:])
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(b[:n]))
}
