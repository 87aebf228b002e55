package conformance

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var (
	docFile = flag.String("doc", "", "write the table of results to this file")
	update  = flag.Bool("update", false, "write the golden files anew")
	full    = flag.Bool("full", false, "the long runs at full length")
)

// top is the top of the tree, seen from this package.
const top = "../.."

// The programs under test, built once: binDir as users get them, crashDir with
// crash points in them.
var binDir, crashDir string

func TestMain(m *testing.M) {
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		code = 1
	}
	os.Exit(code)
}

func buildAndRun(m *testing.M) (int, error) {
	flag.Parse()
	if os.Geteuid() != 0 { // everything will skip
		return m.Run(), nil
	}
	dir, err := os.MkdirTemp("", "overlay-conformance-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	binDir, crashDir = filepath.Join(dir, "bin"), filepath.Join(dir, "crash")
	cni := []string{"./plugins/m-overlay", "./plugins/d-overlay", "./ipam/overlay-ipam"}
	for _, b := range []struct {
		dir  string
		args []string
	}{
		{binDir, slices.Concat(cni, []string{"./overlayd", "./overlayd/overlayctl", "github.com/containernetworking/cni/cnitool"})},
		{binDir + "/mesos-cni-port-mapper", []string{"./integration/lab/ucr/port-mapper"}},
		{crashDir, append([]string{"-tags", "crashpoints"}, cni...)},
	} {
		out := b.dir
		if len(b.args) > 1 {
			out += "/"
		}
		cmd := exec.Command("go", slices.Concat([]string{"build", "-buildvcs=false", "-o", out}, b.args)...)
		cmd.Dir = top
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
		}
	}
	return m.Run(), nil
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// flagValue is what a flag of the test binary was set to.
func flagValue(name string) string {
	if f := flag.Lookup(name); f != nil {
		return f.Value.String()
	}
	return ""
}
