package integration

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"overlayd.internal/overlay/integration/lab"
)

// TestProgramsReplaced: the CNI programs are there for whoever calls them while they are
// replaced as docs/upgrade.md says.
func TestProgramsReplaced(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the programs are built for root only")
	}
	blocks, err := lab.Blocks(top)
	if err != nil {
		t.Fatal(err)
	}
	dir, script := t.TempDir(), "set -e\n"
	for _, b := range blocks {
		if b.Page != "docs/upgrade.md" || b.Mark != "packages archive" {
			continue
		}
		for line := range strings.Lines(b.Script) {
			if strings.Contains(line, "/opt/cni/bin") {
				line = strings.ReplaceAll(line, " bin/", " "+binDir+"/")
				script += strings.ReplaceAll(line, "/opt/cni/bin", dir)
			}
		}
	}
	replace := func(ctx context.Context) error {
		if out, err := exec.CommandContext(ctx, "sh", "-c", script).CombinedOutput(); err != nil {
			return errors.Join(err, errors.New(string(out)))
		}
		return nil
	}
	if err := replace(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, script)
	}
	replaced := make(chan error, 1)
	go func() {
		for range 20 {
			if err := replace(t.Context()); err != nil {
				replaced <- err
				return
			}
		}
		replaced <- nil
	}()
	for {
		select {
		case err := <-replaced:
			if err != nil {
				t.Error(err)
			}
			return
		default:
		}
		cmd := exec.CommandContext(t.Context(), filepath.Join(dir, "d-overlay"))
		cmd.Env = []string{"CNI_COMMAND=VERSION"}
		cmd.Stdin = strings.NewReader(`{"cniVersion": "1.0.0"}`)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("a call while it is replaced: %v\n%s", err, out)
			<-replaced
			return
		}
	}
}
