package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/integration/lab"
)

// A variant is one way of attaching a container: two command lines. The number
// makes container, namespace and host interface unique.
type variant struct {
	name     string
	add, del func(i int) *exec.Cmd
}

// box is one host with the namespaces containers get.
type box struct {
	host   *lab.Netns
	spaces []*lab.Netns
}

// makeBox fills a host with n container namespaces.
func makeBox(ctx context.Context, l *lab.Lab, host *lab.Netns, prefix string, n int) (*box, error) {
	b := &box{host: host}
	for i := range n {
		c, err := l.Netns(ctx, fmt.Sprintf("%s%d", prefix, i))
		if err != nil {
			return nil, err
		}
		b.spaces = append(b.spaces, c)
	}
	return b, nil
}

// run starts the command in the host's namespace, without a helper program that
// would be measured with it, and returns the time from start to end.
func (b *box) run(cmd *exec.Cmd) (time.Duration, error) {
	var took time.Duration
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := ns.WithNetNSPath(b.host.Path, func(ns.NetNS) error {
		start := time.Now()
		err := cmd.Run()
		took = time.Since(start)
		return err
	})
	if err != nil {
		return took, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, indent(out.String()))
	}
	return took, nil
}

// cni builds the call of a CNI program as a runtime makes it.
func cni(path, command, conf, id, netns, pluginPath string) *exec.Cmd {
	cmd := exec.Command(path)
	cmd.Stdin = strings.NewReader(conf)
	cmd.Env = []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + id, "CNI_NETNS=" + netns,
		"CNI_IFNAME=eth0", "CNI_PATH=" + pluginPath, "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + id, "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
	}
	return cmd
}

func (b *box) cniVariant(name, path, pluginPath string, conf map[string]any) variant {
	text, err := json.Marshal(conf)
	if err != nil {
		panic(err) // a literal in this file
	}
	call := func(command string) func(int) *exec.Cmd {
		return func(i int) *exec.Cmd {
			return cni(path, command, string(text), fmt.Sprintf("bench-%d", i), b.spaces[i].Path, pluginPath)
		}
	}
	return variant{name, call("ADD"), call("DEL")}
}

// interleaved runs every variant once a round, in an order left to chance,
// because what the kernel has yet to clean up after one is paid for by the next,
// and records ADD and DEL.
func (b *box) interleaved(ctx context.Context, r *Report, rounds int, variants []variant) error {
	add, del := make([][]float64, len(variants)), make([][]float64, len(variants))
	for round := range rounds + 1 { // the first one warms up
		for _, v := range rand.Perm(len(variants)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			ta, err := b.run(variants[v].add(0))
			if err != nil {
				return fmt.Errorf("%s ADD: %w", variants[v].name, err)
			}
			td, err := b.run(variants[v].del(0))
			if err != nil {
				return fmt.Errorf("%s DEL: %w", variants[v].name, err)
			}
			if round > 0 {
				add[v], del[v] = append(add[v], ms(ta)), append(del[v], ms(td))
			}
		}
	}
	for v := range variants {
		r.add("ADD", variants[v].name, "ms", add[v])
	}
	for v := range variants {
		r.add("DEL", variants[v].name, "ms", del[v])
	}
	return nil
}

// burst starts k ADDs at once and takes the time until all are done, then the
// same with the DELs; the order is left to chance, for the reason above.
func (b *box) burst(ctx context.Context, r *Report, part string, k, rounds int, variants []variant) error {
	addPart, delPart := fmt.Sprintf("%d %s at once", k, part+" ADD"), fmt.Sprintf("%d %s at once", k, part+" DEL")
	add, del := make([][]float64, len(variants)), make([][]float64, len(variants))
	for range rounds {
		for _, v := range rand.Perm(len(variants)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			ta, err := b.together(k, variants[v].add)
			if err != nil {
				return fmt.Errorf("%s ADD: %w", variants[v].name, err)
			}
			td, err := b.together(k, variants[v].del)
			if err != nil {
				return fmt.Errorf("%s DEL: %w", variants[v].name, err)
			}
			add[v], del[v] = append(add[v], ms(ta)), append(del[v], ms(td))
		}
	}
	for v := range variants {
		r.add(addPart, variants[v].name, "ms", add[v])
		r.add(delPart, variants[v].name, "ms", del[v])
	}
	return nil
}

func (b *box) together(k int, cmd func(int) *exec.Cmd) (time.Duration, error) {
	errs := make([]error, k)
	var ready, done sync.WaitGroup
	start := make(chan struct{})
	for i := range k {
		ready.Add(1)
		done.Go(func() {
			// Everything that is not the program is done before: the thread is in
			// the host's namespace, and input and output are files, not pipes that
			// somebody has to serve.
			waiting := sync.OnceFunc(ready.Done)
			defer waiting()
			errs[i] = b.in(cmd(i), func(run func() error) error {
				waiting()
				<-start
				return run()
			})
		})
	}
	ready.Wait()
	t := time.Now()
	close(start)
	done.Wait()
	return time.Since(t), errors.Join(errs...)
}

// in prepares a command in the host's namespace, with files for its input and
// output, and has fn run it.
func (b *box) in(cmd *exec.Cmd, fn func(run func() error) error) error {
	stdin, err := io.ReadAll(cmd.Stdin)
	if err != nil {
		return err
	}
	var files [2]*os.File
	for i := range files {
		fd, err := unix.MemfdCreate("bench", unix.MFD_CLOEXEC)
		if err != nil {
			return err
		}
		files[i] = os.NewFile(uintptr(fd), "bench")
		defer files[i].Close()
	}
	if _, err := files[0].Write(stdin); err != nil {
		return err
	}
	if _, err := files[0].Seek(0, io.SeekStart); err != nil {
		return err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = files[0], files[1], files[1]
	if err := ns.WithNetNSPath(b.host.Path, func(ns.NetNS) error { return fn(cmd.Run) }); err != nil {
		out, readErr := io.ReadAll(io.NewSectionReader(files[1], 0, 1<<20))
		return errors.Join(fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, indent(string(out))), readErr)
	}
	return nil
}
