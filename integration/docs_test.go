package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"overlayd.internal/overlay/integration/lab"
)

// block is one fenced block of a document that is to be run: "```sh test" at the
// top of a built tree, "```sh test host" on a host with an agent and containers.
type block struct {
	at     string // file:line
	onHost bool
	script string
}

var fence = regexp.MustCompile("(?ms)^```sh test( host)?\n(.*?)^```$")

func blocks(t *testing.T) []block {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(top, "docs", "*.md"))
	must(t, err)
	var out []block
	for _, f := range append(files, filepath.Join(top, "README.md")) {
		b, err := os.ReadFile(f)
		must(t, err)
		text := string(b)
		for _, m := range fence.FindAllStringSubmatchIndex(text, -1) {
			out = append(out, block{
				at:     fmt.Sprintf("%s:%d", filepath.Base(f), 1+strings.Count(text[:m[0]], "\n")),
				onHost: m[2] >= 0,
				script: text[m[4]:m[5]],
			})
		}
	}
	return out
}

// TestDocs runs the commands that the documents show.
func TestDocs(t *testing.T) {
	s := upSeed(t, seedConfig(t))
	h := s.Agents[0]
	place(t, s, 0, "a", "dcos", lab.Mesos)
	place(t, s, 1, "b", "dcos", lab.Docker)

	tree, home := t.TempDir(), t.TempDir()
	token, err := s.Overlayctl(t.Context(), "token", "create", "--role", "operator")
	must(t, err)
	login := h.Command(t.Context(), filepath.Join(binDir, "overlayctl"), "login", "--coordinator", s.Coordinator.URL, "--token", strings.TrimSpace(token))
	login.Env = append(os.Environ(), "HOME="+home)
	if out, err := login.CombinedOutput(); err != nil {
		t.Fatalf("log in: %v\n%s", err, out)
	}
	for link, to := range map[string]string{"bin": binDir, "conf": filepath.Join(top, "conf"), "docs": filepath.Join(top, "docs")} {
		to, err := filepath.Abs(to)
		must(t, err)
		must(t, os.Symlink(to, filepath.Join(tree, link)))
	}
	where := map[bool]int{}
	for _, b := range blocks(t) {
		where[b.onHost]++
		t.Run(b.at, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", b.script)
			if b.onHost {
				// The default directories, for this command alone.
				cmd = h.Command(t.Context(), "unshare", "--mount", "--propagation", "private", "bash", "-euo", "pipefail", "-c", `
mount -t tmpfs none /run && mkdir /run/overlay && mount --bind "$0" /run/overlay
mount -t tmpfs none /var/lib && mkdir /var/lib/overlay && mount --bind "$1" /var/lib/overlay
exec bash -euo pipefail -c "$2"`, h.RunDir, h.StateDir, b.script)
				cmd.Env = append(os.Environ(), "PATH="+binDir+":"+os.Getenv("PATH"), "HOME="+home)
			}
			cmd.Dir = tree
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s\nprints:\n%s", err, b.script, out)
			}
		})
	}
	if where[true] == 0 || where[false] == 0 {
		t.Errorf("%d blocks run at the top of the tree and %d on a host; is the mark still the same?", where[false], where[true])
	}
}

// TestTreeLinks: what the documents point to is there.
func TestTreeLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]+)(?:#[^)]*)?\)`)
	var files []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/*/*.md"} {
		m, err := filepath.Glob(filepath.Join(top, pattern))
		must(t, err)
		files = append(files, m...)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		must(t, err)
		for _, m := range link.FindAllStringSubmatch(string(b), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(f), m[1])); err != nil {
				t.Errorf("%s points to %s: %v", f, m[1], err)
			}
		}
	}
}

// TestTreeNames: directories and files that the pages for contributors cite
// exist, and so do the names beside them: "`dir`: `name`" and "`name` of `dir`".
func TestTreeNames(t *testing.T) {
	place := regexp.MustCompile("`((?:conf|internal|ipam|plugins|overlayd|integration|scripts|docs|findings)(?:/[A-Za-z0-9_./-]*)?)`(?:: `([A-Za-z0-9_]+)`|)")
	named := regexp.MustCompile("`([A-Za-z0-9_]+)` of `([a-z]+/[A-Za-z0-9_./-]*)`")
	found := 0
	check := func(page, path, name string) {
		found++
		at := filepath.Join(top, path)
		if _, err := os.Stat(at); err != nil {
			t.Errorf("%s cites %s: %v", page, path, err)
			return
		}
		if name == "" {
			return
		}
		files, err := filepath.Glob(filepath.Join(at, "*.go"))
		must(t, err)
		if strings.HasSuffix(path, ".go") {
			files = []string{at}
		}
		word := regexp.MustCompile(`\b` + name + `\b`)
		for _, f := range files {
			b, err := os.ReadFile(f)
			must(t, err)
			if word.Match(b) {
				return
			}
		}
		t.Errorf("%s cites %s in %s, where it is not", page, name, path)
	}
	for _, page := range []string{"README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/architecture.md"} {
		b, err := os.ReadFile(filepath.Join(top, page))
		must(t, err)
		for _, m := range place.FindAllStringSubmatch(string(b), -1) {
			check(page, m[1], m[2])
		}
		for _, m := range named.FindAllStringSubmatch(string(b), -1) {
			check(page, m[2], m[1])
		}
	}
	if found < 60 {
		t.Errorf("found %d names on the pages; is their form still the same?", found)
	}
}

// TestTreeReadme: the README is an introduction.
func TestTreeReadme(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(top, "README.md"))
	must(t, err)
	if lines := strings.Count(string(b), "\n"); lines > 150 {
		t.Errorf("README.md has %d lines, want at most 150: tables go to docs/reference.md", lines)
	}
}

// TestTreePicturedLayers: docs/architecture.md has the layers that are checked.
func TestTreePicturedLayers(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(top, "docs/architecture.md"))
	must(t, err)
	for _, l := range layers {
		if !strings.Contains(string(b), "\n| `"+l.room+"` |") && !strings.Contains(l.room, "overlay-ipam") {
			t.Errorf("docs/architecture.md, Layers, lacks %s", l.room)
		}
	}
}
