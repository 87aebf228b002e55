package fastpath

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// objects are what bpf2go writes.
var objects = []string{"programs_bpfeb.go", "programs_bpfeb.o", "programs_bpfel.go", "programs_bpfel.o"}

// sums is the file that says of which sources the objects were made, and by
// which compiler.
const sums = "bpf/objects.sum"

// The committed objects are those of the committed sources. Where the compiler
// they were made with is installed they are made again and compared byte by
// byte; where another one is, what it makes must load.
func TestObjectsMatchTheirSources(t *testing.T) {
	compiler := clangVersion(t)
	if os.Getenv("UPDATE_OBJECTS") != "" {
		if err := os.WriteFile(sums, []byte(sourceSums(t, compiler)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(sums)
	if err != nil {
		t.Fatal(err)
	}
	recorded, _, _ := strings.Cut(string(want), "\n")
	if got := sourceSums(t, recorded); got != string(want) {
		t.Fatalf("the sources or objects are not those of %s; see generate.go\n%s", sums, got)
	}
	if compiler == "" {
		t.Log("clang is not installed; the checksums agree")
		return
	}
	dir := t.TempDir()
	cmd := exec.Command("go", append([]string{"tool", "bpf2go", "-output-dir", dir, "-go-package", "fastpath"}, generateArgs(t)...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", cmd, err, out)
	}
	for _, name := range objects {
		made, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		committed, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if compiler == recorded && !bytes.Equal(made, committed) {
			t.Errorf("%s is not what %s makes of the sources", name, compiler)
		}
	}
}

// generateArgs are the arguments of bpf2go in generate.go.
func generateArgs(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile("generate.go")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if args, ok := strings.CutPrefix(strings.TrimSpace(line), "//go:generate go tool bpf2go "); ok {
			return strings.Fields(args)
		}
	}
	t.Fatal("generate.go does not call bpf2go")
	return nil
}

// clangVersion is the first line of clang --version; empty where clang or
// llvm-strip, which bpf2go runs as well, is missing.
func clangVersion(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("llvm-strip"); errors.Is(err, exec.ErrNotFound) {
		return ""
	}
	out, err := exec.Command("clang", "--version").Output()
	if errors.Is(err, exec.ErrNotFound) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line
}

// sourceSums is the compiler and one line for each source and object.
func sourceSums(t *testing.T, compiler string) string {
	t.Helper()
	files := slices.Concat([]string{"generate.go"}, objects)
	err := filepath.WalkDir("bpf", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && path != sums {
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(files)
	var b strings.Builder
	fmt.Fprintln(&b, compiler)
	for _, f := range files {
		content, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%x  %s\n", sha256.Sum256(content), f)
	}
	return b.String()
}
