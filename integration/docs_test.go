package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"overlayd.internal/overlay/integration/lab"
)

// notRun are the commands in the pages that nobody runs, by the word of their mark, and
// why. A page says of each that it was not tried, or what stands in for it.
var notRun = map[string]string{
	"dcos":     "asks the leading master of a DC/OS cluster; its answer in DC/OS's documentation, conf/examples/dcos-state.json, is imported instead",
	"dnf":      "needs a distribution of .rpm; content and scripts of the packages are looked at by scripts/packages",
	"registry": "needs a registry of images; the engines' tests bring an image of that name",
	"nerdctl":  "is no package of Debian 12",
	"mesos":    "Mesos does not build here; what its isolator does is replayed by integration/lab/ucr",
	"nomad":    "Nomad cannot be got here",
	"podman5":  "Podman 5 is no package of Debian 12; the plugin speaks netavark's protocol in plugins/overlay-netavark",
}

// marks are who runs a block of commands; see lab.Block.
var marks = []string{
	"test", "test host", "test first", "test first daemon", "test second", "test second daemon",
	"engines one", "engines two", "packages upgrade", "packages archive", "verbs",
}

// readmeMarks are those of scripts/readme.
var readmeMarks = []string{"build", "hosts", "first", "second"}

func blocks(t *testing.T) []lab.Block {
	t.Helper()
	all, err := lab.Blocks(top)
	must(t, err)
	return all
}

// TestTreeBlocks: somebody runs every block of commands in the pages, or it is one of
// those above.
func TestTreeBlocks(t *testing.T) {
	command := regexp.MustCompile(`(?m)^([$#] )?(overlay|sudo |systemctl |curl |make |docker |podman |ip |apt)`)
	reasons := map[string]int{}
	count := map[string]int{}
	for _, b := range blocks(t) {
		word, isNotRun := strings.CutPrefix(b.Mark, "not-run ")
		switch {
		case isNotRun:
			if reasons[word]++; notRun[word] == "" {
				t.Errorf("%s: nobody runs it, and notRun of this test does not say why", b.At())
			}
		case b.Lang == "sh" && slices.Contains(marks, b.Mark), b.Lang == "sh" && b.Page == "README.md" && slices.Contains(readmeMarks, b.Mark):
			count[b.Mark]++
			if b.Mark == "verbs" {
				checkVerbs(t, b)
			}
		case b.Lang == "yaml" && b.Mark == "", b.Lang == "toml" && b.Mark == "engines one": // loaded by TestDocs and TestPages
		case b.Lang == "json" && b.Mark == "":
			if !json.Valid([]byte(b.Script)) {
				t.Errorf("%s is not JSON", b.At())
			}
		case b.Lang == "" && !command.MatchString(b.Script): // what is printed, or a picture
		default:
			t.Errorf("%s: %q runs nobody; lab.Block has the marks", b.At(), strings.TrimSpace(b.Lang+" "+b.Mark))
		}
	}
	for word := range notRun {
		if reasons[word] == 0 {
			t.Errorf("notRun has %s, and no page does", word)
		}
	}
	for _, mark := range slices.Concat(marks, readmeMarks) {
		if count[mark] == 0 {
			t.Errorf("no page has a block with the mark %q", mark)
		}
	}
}

// checkVerbs: what contributors type would have a test of this tree run this tree, so it
// is looked up: verbs of the Makefile that run a script, scripts, and tests that are there.
func checkVerbs(t *testing.T, b lab.Block) {
	t.Helper()
	makefile, err := os.ReadFile(filepath.Join(top, "Makefile"))
	must(t, err)
	for line := range strings.Lines(b.Script) {
		bare, _, _ := strings.Cut(line, "#")
		words := strings.Fields(bare)
		switch {
		case len(words) == 2 && words[0] == "make":
			if !regexp.MustCompile(`(?m)^` + words[1] + `: ## .*\n\t@.*scripts/` + words[1]).Match(makefile) {
				t.Errorf("%s: the Makefile has no verb %s that runs its script", b.At(), words[1])
			}
		case len(words) == 4 && words[0] == "scripts/test" && words[1] == "-run":
			out, err := exec.Command("grep", "-l", "func "+words[2]+"(t \\*testing.T)", "-r", filepath.Join(top, words[3])).Output()
			if err != nil || len(out) == 0 {
				t.Errorf("%s: there is no test %s in %s", b.At(), words[2], words[3])
			}
		default:
			t.Errorf("%s: %s is no verb", b.At(), strings.TrimSpace(line))
		}
	}
}

// TestDocs runs the commands that pages show of a tree, and of a host with containers.
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
	for _, b := range blocks(t) {
		var cmd *exec.Cmd
		switch {
		case b.Lang == "sh" && b.Mark == "test":
			cmd = exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", b.Script)
		case b.Lang == "sh" && b.Mark == "test host":
			// The default directories, for this command alone.
			cmd = h.Command(t.Context(), "unshare", "--mount", "--propagation", "private", "bash", "-euo", "pipefail", "-c", `
mount -t tmpfs none /run && mkdir /run/overlay && mount --bind "$0" /run/overlay
mount -t tmpfs none /var/lib && mkdir /var/lib/overlay && mount --bind "$1" /var/lib/overlay
mount -t tmpfs none /opt && mkdir -p /opt/cni/bin && mount --bind "$2" /opt/cni/bin
exec bash -euo pipefail -c "$3"`, h.RunDir, h.StateDir, binDir, b.Script)
			cmd.Env = append(os.Environ(), "PATH="+binDir+":"+os.Getenv("PATH"), "HOME="+home, "NETCONFPATH="+h.CNIConfDir)
		case b.Lang == "yaml": // ours, all of them
			cmd = exec.CommandContext(t.Context(), "bin/overlayd", "check-config", "/dev/stdin")
			cmd.Stdin = strings.NewReader(b.Script)
		default:
			continue
		}
		t.Run(b.At(), func(t *testing.T) {
			cmd.Dir = tree
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s\nprints:\n%s", err, b.Script, out)
			}
		})
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
