// Command crictl is a small client of the container runtime interface: as much
// of it as it takes to launch one container in a sandbox, ask for its address,
// execute something in it and remove it. Answers are JSON on stdout.
//
//	crictl [-socket FILE] version
//	crictl [-socket FILE] status
//	crictl [-socket FILE] run [-name N] [-image I] [-port HOST:CONTAINER]... [-cgroup-parent DIR] [--] COMMAND...
//	crictl [-socket FILE] pods
//	crictl [-socket FILE] inspect SANDBOX
//	crictl [-socket FILE] exec CONTAINER COMMAND...
//	crictl [-socket FILE] stop SANDBOX
//	crictl [-socket FILE] rm SANDBOX
//
// It is a module of its own, so that nothing else of the project depends on
// gRPC and the interface's definitions for its sake.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "crictl:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("crictl", flag.ContinueOnError)
	socket := flags.String("socket", "/run/containerd/containerd.sock", "socket of the runtime")
	if err := flags.Parse(args); err != nil {
		return err
	}
	args = flags.Args()
	if len(args) == 0 {
		return errors.New("which command? see its documentation")
	}
	conn, err := grpc.NewClient("unix://"+*socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	c := client{cri.NewRuntimeServiceClient(conn)}

	verb, args := args[0], args[1:]
	one := func(do func(context.Context, string) (any, error)) (any, error) {
		if len(args) != 1 {
			return nil, fmt.Errorf("%s: want one id", verb)
		}
		return do(ctx, args[0])
	}
	var answer any
	switch verb {
	case "version":
		answer, err = c.Version(ctx, &cri.VersionRequest{})
	case "status":
		answer, err = c.conditions(ctx)
	case "run":
		answer, err = c.run(ctx, args)
	case "pods":
		answer, err = c.pods(ctx)
	case "inspect":
		answer, err = one(c.inspect)
	case "exec":
		return c.exec(ctx, args)
	case "stop":
		answer, err = one(func(ctx context.Context, id string) (any, error) {
			return c.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id})
		})
	case "rm":
		answer, err = one(func(ctx context.Context, id string) (any, error) {
			return c.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
		})
	default:
		err = fmt.Errorf("no command %q", verb)
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(answer)
}

type client struct{ cri.RuntimeServiceClient }

// conditions says which of RuntimeReady and NetworkReady hold; the reason
// stands in the place of one that does not.
func (c client) conditions(ctx context.Context) (map[string]string, error) {
	r, err := c.Status(ctx, &cri.StatusRequest{})
	if err != nil {
		return nil, err
	}
	is := map[string]string{}
	for _, cond := range r.GetStatus().GetConditions() {
		is[cond.GetType()] = "true"
		if !cond.GetStatus() {
			is[cond.GetType()] = cond.GetReason() + ": " + cond.GetMessage()
		}
	}
	return is, nil
}

// pod is what is printed of a sandbox and the container in it.
type pod struct {
	Sandbox   string   `json:"sandbox"`
	Container string   `json:"container,omitempty"`
	Name      string   `json:"name,omitempty"`
	Ready     bool     `json:"ready"`
	IPs       []string `json:"ips,omitempty"`
	Netns     string   `json:"netns,omitempty"`
}

// run launches a sandbox with one container. One that cannot be launched whole
// is removed again.
func (c client) run(ctx context.Context, args []string) (any, error) {
	flags := flag.NewFlagSet("run", flag.ContinueOnError)
	name := flags.String("name", "pod", "name of the pod")
	image := flags.String("image", "", "image of the container")
	parent := flags.String("cgroup-parent", "", "cgroup above that of the sandbox")
	var ports []*cri.PortMapping
	flags.Func("port", "HOST:CONTAINER port", func(s string) error {
		host, container, _ := strings.Cut(s, ":")
		h, err1 := strconv.ParseInt(host, 10, 32)
		k, err2 := strconv.ParseInt(container, 10, 32)
		ports = append(ports, &cri.PortMapping{HostPort: int32(h), ContainerPort: int32(k)})
		return errors.Join(err1, err2)
	})
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	sandbox := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: *name, Uid: *name, Namespace: "default"},
		Hostname:     *name,
		PortMappings: ports,
		Linux:        &cri.LinuxPodSandboxConfig{CgroupParent: *parent},
	}
	s, err := c.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: sandbox})
	if err != nil {
		return nil, fmt.Errorf("run sandbox %s: %w", *name, err)
	}
	id := s.GetPodSandboxId()
	container, err := c.start(ctx, id, &cri.CreateContainerRequest{
		PodSandboxId: id,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"},
			Image:    &cri.ImageSpec{Image: *image},
			Command:  flags.Args(),
		},
		SandboxConfig: sandbox,
	})
	if err != nil {
		_, gone := c.RemovePodSandbox(context.WithoutCancel(ctx), &cri.RemovePodSandboxRequest{PodSandboxId: id})
		return nil, errors.Join(err, gone)
	}
	p, err := c.describe(ctx, id)
	p.Container = container
	return p, err
}

func (c client) start(ctx context.Context, sandbox string, r *cri.CreateContainerRequest) (string, error) {
	k, err := c.CreateContainer(ctx, r)
	if err != nil {
		return "", fmt.Errorf("create container in sandbox %s: %w", sandbox, err)
	}
	if _, err := c.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: k.GetContainerId()}); err != nil {
		return "", fmt.Errorf("start container %s: %w", k.GetContainerId(), err)
	}
	return k.GetContainerId(), nil
}

func (c client) pods(ctx context.Context) ([]pod, error) {
	r, err := c.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	pods := []pod{}
	for _, s := range r.GetItems() {
		pods = append(pods, pod{
			Sandbox: s.GetId(), Name: s.GetMetadata().GetName(),
			Ready: s.GetState() == cri.PodSandboxState_SANDBOX_READY,
		})
	}
	return pods, nil
}

func (c client) inspect(ctx context.Context, id string) (any, error) { return c.describe(ctx, id) }

// describe is a sandbox with its addresses and its network namespace, the
// latter from containerd's verbose status.
func (c client) describe(ctx context.Context, id string) (pod, error) {
	r, err := c.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		return pod{}, fmt.Errorf("status of sandbox %s: %w", id, err)
	}
	s := r.GetStatus()
	p := pod{
		Sandbox: s.GetId(), Name: s.GetMetadata().GetName(),
		Ready: s.GetState() == cri.PodSandboxState_SANDBOX_READY,
	}
	if ip := s.GetNetwork().GetIp(); ip != "" {
		p.IPs = append(p.IPs, ip)
	}
	for _, ip := range s.GetNetwork().GetAdditionalIps() {
		p.IPs = append(p.IPs, ip.GetIp())
	}
	var info struct {
		RuntimeSpec struct {
			Linux struct {
				Namespaces []struct{ Type, Path string }
			}
		}
	}
	if text := r.GetInfo()["info"]; text != "" {
		if err := json.Unmarshal([]byte(text), &info); err != nil {
			return p, fmt.Errorf("verbose status of sandbox %s: %w", id, err)
		}
	}
	for _, ns := range info.RuntimeSpec.Linux.Namespaces {
		if ns.Type == "network" {
			p.Netns = ns.Path
		}
	}
	return p, nil
}

// exec passes on what the program prints, and its failure.
func (c client) exec(ctx context.Context, args []string) error {
	if len(args) < 2 {
		return errors.New("exec: want a container and a command")
	}
	r, err := c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: args[0], Cmd: args[1:], Timeout: 60})
	if err != nil {
		return fmt.Errorf("exec in %s: %w", args[0], err)
	}
	os.Stdout.Write(r.GetStdout())
	os.Stderr.Write(r.GetStderr())
	if code := r.GetExitCode(); code != 0 {
		return fmt.Errorf("%s ended with status %d", args[1], code)
	}
	return nil
}
