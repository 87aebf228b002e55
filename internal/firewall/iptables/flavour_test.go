package iptables

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestUnusedFlavour: a program is of the flavour of its file, and one with a name that
// tells nothing of the flavour that it says.
func TestUnusedFlavour(t *testing.T) {
	for _, tt := range []struct{ program, unused string }{{"iptables-nft", legacyFlavour}, {"iptables-legacy", nftFlavour}} {
		path, err := exec.LookPath(tt.program)
		if err != nil {
			t.Skip("needs " + tt.program)
		}
		file, err := filepath.EvalSymlinks(path)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "iptables"), []byte("#!/bin/sh\nexec "+path+" \"$@\"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		for _, program := range []string{file, filepath.Join(dir, "iptables")} {
			if got, err := new(family).unused(t.Context(), program); got != tt.unused || err != nil {
				t.Errorf("beside %s: %q, %v; want %q", program, got, err, tt.unused)
			}
		}
	}
}
