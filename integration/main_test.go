package integration

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// binDir has the real programs, built once for all tests: overlayd with the race
// detector, whose reports fail the test that ran it, the rest as users get them.
var binDir string

var full = flag.Bool("full", false, "run what is too long for CI as well")

// stores are those that what belongs to no store is shown on.
func stores() []string {
	if *full {
		return []string{"bbolt", "etcd"}
	}
	return []string{"bbolt"}
}

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		code = 1
	}
	os.Exit(code)
}

func buildAndRun(m *testing.M) (int, error) {
	if os.Geteuid() != 0 { // all tests that need the programs will skip
		return m.Run(), nil
	}
	dir, err := os.MkdirTemp("", "overlay-bin-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	binDir = dir
	if lintOnly() {
		return m.Run(), nil
	}
	race := []string{"-race"}
	if _, err := exec.LookPath("gcc"); err != nil {
		race = nil
	}
	for _, b := range []struct {
		cgo   string
		flags []string
		pkgs  []string
	}{
		{"1", race, []string{"./overlayd"}},
		{"0", nil, []string{"./overlayd/overlayctl", "./plugins/m-overlay", "./plugins/d-overlay", "./ipam/overlay-ipam", "github.com/containernetworking/cni/cnitool"}},
	} {
		cmd := exec.Command("go", slices.Concat([]string{"build", "-buildvcs=false", "-o", dir + "/"}, b.flags, b.pkgs)...)
		cmd.Dir = top
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+b.cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
		}
	}
	// The race detector's runtime would have every program sleep before it ends.
	os.Setenv("GORACE", "atexit_sleep_ms=0")
	return m.Run(), nil
}

// lintOnly reports whether only the tests of tree_test.go were asked for.
func lintOnly() bool {
	return slices.ContainsFunc(os.Args, func(a string) bool { return strings.HasPrefix(a, "-test.run=^TestTree") })
}

func options() lab.Options {
	return lab.Options{Bin: binDir, CNITool: filepath.Join(binDir, "cnitool")}
}

// seedConfig is the first configuration of the overlay's first document.
func seedConfig(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(top, "conf/examples/overlay.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// newSeed makes the seed's hosts; nothing runs yet. Whatever is started in there
// ends with the test.
func newSeed(t *testing.T, config string) *lab.Seed {
	t.Helper()
	return makeSeed(t, config, options())
}

func makeSeed(t *testing.T, config string, o lab.Options) *lab.Seed {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	s, err := lab.NewSeed(t.Context(), o, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if races := s.Races(); races != "" {
			t.Errorf("the race detector says:\n%s", races)
		}
		if t.Failed() {
			s.Logs(t.Output(), 40)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// upSeed is newSeed with everything running, and everybody identified, as is the
// default.
func upSeed(t *testing.T, config string) *lab.Seed {
	t.Helper()
	o := options()
	o.Secure = true
	s := makeSeed(t, config, o)
	must(t, s.Up(t.Context()))
	return s
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// place attaches a container that answers.
func place(t *testing.T, s *lab.Seed, agent int, name, overlay, half string) *lab.Container {
	t.Helper()
	c, err := s.Place(t.Context(), lab.Placement{Agent: agent, Name: name, Overlay: overlay, Half: half})
	must(t, err)
	return c
}

// checkTraffic pings and transfers between all of the seed's pairs.
func checkTraffic(t *testing.T, s *lab.Seed) {
	t.Helper()
	pairs, err := s.Pairs()
	must(t, err)
	failed := 0
	for _, r := range lab.CheckPairs(t.Context(), pairs) {
		if r.Err != nil {
			failed++
			t.Error(r)
		}
	}
	t.Logf("%d of %d pairs talk", len(pairs)-failed, len(pairs))
}

// wait is lab.Wait for tests that cannot go on without.
func wait(t *testing.T, what string, timeout time.Duration, f func() error) {
	t.Helper()
	must(t, lab.Wait(t.Context(), what, timeout, f))
}

// waitPing waits until an address answers.
func waitPing(t *testing.T, from *lab.Netns, to netip.Addr, timeout time.Duration) {
	t.Helper()
	wait(t, fmt.Sprintf("%s to answer %s", to, from.Name), timeout, func() error {
		_, err := from.Ping(t.Context(), to, 1)
		return err
	})
}

// program runs one of the programs where the test runs, and returns its output
// and exit status.
func program(t *testing.T, argv ...string) (out string, status int) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, as what it is told about does")
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(binDir, argv[0]), argv[1:]...)
	b, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(b), cmd.ProcessState.ExitCode()
}
