package integration

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// TestDemo runs the demonstration to its end, and interrupts it on the way: in
// both cases nothing is left of it.
func TestDemo(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	demo := filepath.Join(t.TempDir(), "demo")
	build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", demo, "./tools/demo")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, c := range []struct {
		name   string
		until  string // what it prints when it is interrupted
		signal os.Signal
		status int
		last   string
	}{
		{"whole", "", nil, 0, `^demo: \d+ checks passed$`},
		{"etcd", "", nil, 0, `^demo: \d+ checks passed$`},
		{"ctrl-c", "172.17.0.4 has leased", os.Interrupt, 130, `^demo: interrupted$`},
		{"terminated", "agent1-dcos-d2", syscall.SIGTERM, 130, `^demo: interrupted$`},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), demo, "-bin", binDir, "-cnitool", filepath.Join(binDir, "cnitool"))
			if c.name == "etcd" {
				cmd.Args = append(cmd.Args, "-store", "etcd")
			}
			cmd.Dir = top
			r, w := io.Pipe()
			cmd.Stdout, cmd.Stderr = w, w
			must(t, cmd.Start())
			done := make(chan error, 1)
			go func() {
				done <- cmd.Wait()
				w.Close()
			}()
			var all strings.Builder
			last := ""
			for lines := bufio.NewScanner(r); lines.Scan(); {
				fmt.Fprintln(&all, lines.Text())
				if lines.Text() != "" {
					last = lines.Text()
				}
				if c.until != "" && strings.Contains(lines.Text(), c.until) {
					must(t, cmd.Process.Signal(c.signal))
				}
			}
			<-done
			if got := cmd.ProcessState.ExitCode(); got != c.status || !regexp.MustCompile(c.last).MatchString(last) {
				t.Errorf("status %d, want %d; it prints:\n%s", got, c.status, all.String())
			}
			lab := fmt.Sprintf("ovl%d", cmd.Process.Pid)
			for _, pattern := range []string{"/run/netns/" + lab + "-*", filepath.Join(os.TempDir(), lab+"*")} {
				left, err := filepath.Glob(pattern)
				must(t, err)
				if len(left) > 0 {
					t.Errorf("left over: %q", left)
				}
			}
		})
	}
}
