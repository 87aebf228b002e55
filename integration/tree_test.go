package integration

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The rules of the tree. `make lint` runs the tests of this file alone.

const module = "overlayd.internal/overlay"

// top is the top of the tree, seen from this package.
const top = ".."

type pkg struct {
	ImportPath   string
	Name         string
	Dir          string
	Doc          string
	GoFiles      []string
	TestGoFiles  []string
	XTestGoFiles []string
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
}

// rel is the import path within the module.
func (p pkg) rel() string { return strings.TrimPrefix(p.ImportPath, module+"/") }

// within reports whether path is one of the directories or below one.
func within(path string, dirs ...string) bool {
	return slices.ContainsFunc(dirs, func(d string) bool { return path == d || strings.HasPrefix(path, d+"/") })
}

func packages(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json", "./...")
	cmd.Dir = top
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var pkgs []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
	if len(pkgs) < 5 {
		t.Fatalf("go list found %d packages; is this the module?", len(pkgs))
	}
	return pkgs
}

// layer is a room and what its packages may import of ours.
type layer struct {
	room  string
	may   []string
	never []string // of what it may
	why   string
}

// layers says for each room of the tree which rooms its packages may import, as
// docs/architecture.md draws them. The first room that a package is in counts.
var layers = []layer{
	{"conf", []string{"conf"}, nil, "is the vocabulary and imports nothing of ours"},
	{"internal/cni", []string{"conf", "internal", "ipam"}, nil, "is the frame of the CNI programs"},
	{"internal", []string{"conf", "internal"}, []string{"internal/cni"}, "is what several rooms stand on, and knows only the vocabulary"},
	{"ipam/overlay-ipam", []string{"conf", "internal", "ipam"}, nil, "is a CNI program on the address store"},
	{"ipam", []string{"conf", "internal", "ipam"}, []string{"internal/cni"}, "is the address store alone"},
	{"plugins", []string{"conf", "internal", "ipam", "plugins"}, nil, "runs without the daemon"},
	{"overlayd", []string{"conf", "internal", "ipam", "overlayd"}, []string{"internal/cni"}, "never links a plugin or the frame of one"},
	{"integration", []string{"integration"}, nil, "knows the programs from outside only"},
}

// notYet are imports that break a rule of this file and are to go. A line that
// is no longer needed is an error.
var notYet = map[string]string{}

// excused reports whether notYet has the import, and notes that it is needed.
func excused(needed map[string]bool, from, imp string) bool {
	key := from + " -> " + imp
	needed[key] = true
	_, ok := notYet[key]
	return ok
}

func TestTreeLayers(t *testing.T) {
	needed := map[string]bool{}
	pkgs := packages(t)
	for _, p := range pkgs {
		room := slices.IndexFunc(layers, func(l layer) bool { return within(p.rel(), l.room) })
		if room < 0 {
			t.Errorf("%s is in no room of the tree; the rooms are in layers", p.ImportPath)
			continue
		}
		l := layers[room]
		for _, imp := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			rel, ours := strings.CutPrefix(imp, module+"/")
			if ours && rel != p.rel() && (!within(rel, l.may...) || within(rel, l.never...)) && !excused(needed, p.rel(), rel) {
				t.Errorf("%s imports %s, but %s %s", p.rel(), rel, l.room, l.why)
			}
		}
	}
	for _, p := range pkgs {
		for _, r := range reserved {
			for _, imp := range p.Imports {
				if within(imp, r.modules...) && !within(p.rel(), r.only...) && !within(p.rel(), "integration") && !excused(needed, p.rel(), imp) {
					t.Errorf("%s imports %s; only %s may: %s", p.rel(), imp, strings.Join(r.only, ", "), r.why)
				}
			}
		}
	}
	for key := range notYet {
		if !needed[key] {
			t.Errorf("notYet has %q, which is no longer so: remove the line", key)
		}
	}
}

// reserved are imports that belong to some packages alone. The tests of a
// package may use them too.
var reserved = []struct {
	modules []string
	only    []string
	why     string
}{
	{[]string{"go.etcd.io/etcd"}, []string{"overlayd/internal/store/etcd"}, "agents and programs never speak to etcd"},
	{[]string{"github.com/cilium/ebpf"}, []string{"internal/fastpath"}, "one package loads programs into the kernel"},
	{[]string{"github.com/vishvananda/netlink", "github.com/mdlayher/netlink"}, []string{"internal/rtnl", "internal/firewall"},
		"one package opens netlink sockets, but for ipset and nftables, whose libraries bring their own"},
	{[]string{"github.com/coreos/go-iptables"}, []string{"internal/firewall"}, "one package writes firewall rules"},
	{[]string{"go.etcd.io/bbolt"}, []string{"ipam", "internal/boltfile", "overlayd/internal/store/bbolt"}, "a file has one owner"},
	{[]string{"go.yaml.in", "gopkg.in/yaml.v2", "gopkg.in/yaml.v3", "sigs.k8s.io/yaml"}, []string{"conf/clusterfile", "overlayd"}, "CNI programs read JSON only"},
	{[]string{"github.com/spf13"}, []string{"overlayd"}, "CNI programs take no flags"},
	{[]string{"github.com/prometheus"}, []string{"overlayd/internal/metrics"}, "one package makes metrics"},
	{[]string{"net/http"}, []string{"overlayd"}, "only the daemon and its tool speak HTTP"},
}

// TestTreeSlimCNIPrograms: go links what a package imports, and that costs a CNI
// program start-up time: pages to load, and what the package does before main.
func TestTreeSlimCNIPrograms(t *testing.T) {
	banned := []string{
		"net/http", "crypto/tls", "go.yaml.in", "gopkg.in/yaml.v2", "gopkg.in/yaml.v3", "sigs.k8s.io/yaml",
		"go.etcd.io/etcd", "github.com/spf13", "google.golang.org/grpc", "github.com/cilium", "github.com/prometheus",
		// Small ones that make tables when a program starts.
		"regexp", "hash/crc32", "text/template", "log/slog",
	}
	slim := map[string]bool{"plugins/m-overlay": false, "plugins/d-overlay": false, "ipam/overlay-ipam": false}
	for _, p := range packages(t) {
		if p.Name != "main" || !within(p.rel(), "plugins", "ipam") {
			continue
		}
		slim[p.rel()] = true
		// What they do link shows that the list is one.
		for _, d := range []string{"runtime", "go.etcd.io/bbolt", module + "/conf"} {
			if !slices.Contains(p.Deps, d) {
				t.Errorf("%s does not link %s, or go list did not say what it links", p.rel(), d)
			}
		}
		for _, d := range p.Deps {
			if within(d, banned...) {
				t.Errorf("%s links %s; run `go list -deps ./%s` and `go mod why` to see through which package", p.rel(), d, p.rel())
			}
		}
	}
	for program, seen := range slim {
		if !seen {
			t.Errorf("%s is no longer there; say here which the CNI programs are", program)
		}
	}
}

// TestTreeNetlinkSockets: one package opens netlink sockets, also by hand.
func TestTreeNetlinkSockets(t *testing.T) {
	opened := false
	for _, p := range packages(t) {
		if within(p.rel(), "integration") {
			continue
		}
		for _, name := range p.GoFiles {
			b, err := os.ReadFile(filepath.Join(p.Dir, name))
			must(t, err)
			if !strings.Contains(string(b), "AF_NETLINK") {
				continue
			}
			if within(p.rel(), "internal/rtnl") {
				opened = true
			} else {
				t.Errorf("%s/%s opens a netlink socket; use internal/rtnl", p.rel(), name)
			}
		}
	}
	if !opened {
		t.Error("internal/rtnl opens no netlink socket; say here who does")
	}
}

func TestTreeGoMod(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(top, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	for i, line := range strings.Split(string(b), "\n") {
		if strings.HasPrefix(strings.TrimSpace(line), "replace") {
			t.Errorf("go.mod:%d: %s: no replace, so that the module can be used and installed by others", i+1, line)
		}
	}
}

// TestTreeSource parses every file: one package comment a package, no init
// functions, os.Exit and log.Fatal only where a program ends.
func TestTreeSource(t *testing.T) {
	for _, p := range packages(t) {
		comments := 0
		for _, name := range slices.Concat(p.GoFiles, p.TestGoFiles, p.XTestGoFiles) {
			fset := token.NewFileSet()
			file, err := parser.ParseFile(fset, filepath.Join(p.Dir, name), nil, parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			test := strings.HasSuffix(name, "_test.go")
			if file.Doc != nil && !test {
				comments++
			}
			for _, decl := range file.Decls {
				f, ok := decl.(*ast.FuncDecl)
				if !ok {
					continue
				}
				at := fset.Position(f.Pos())
				if f.Recv == nil && f.Name.Name == "init" {
					t.Errorf("%s:%d: func init: say in the code that needs it what runs when", at.Filename, at.Line)
				}
				// TestMain, main and Main end a program; so does what a test
				// binary runs in their place.
				if !test && f.Name.Name != "main" && f.Name.Name != "Main" && exits(f) {
					t.Errorf("%s:%d: func %s ends the program; return an error or a status to main", at.Filename, at.Line, f.Name.Name)
				}
			}
		}
		if len(p.GoFiles) > 0 && comments != 1 {
			t.Errorf("%s has %d package comments, want exactly one", p.rel(), comments)
		}
	}
}

// exits reports whether a function calls os.Exit or one of log.Fatal's family.
func exits(f *ast.FuncDecl) bool {
	found := false
	ast.Inspect(f, func(n ast.Node) bool {
		sel, ok := n.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if x, ok := sel.X.(*ast.Ident); ok {
			found = found || x.Name == "os" && sel.Sel.Name == "Exit" || x.Name == "log" && strings.HasPrefix(sel.Sel.Name, "Fatal")
		}
		return true
	})
	return found
}

// TestTreeVerbs: what people and machines are told to type is there.
func TestTreeVerbs(t *testing.T) {
	b, err := os.ReadFile("../Makefile")
	must(t, err)
	for _, verb := range []string{"setup", "build", "demo", "test", "soak", "bench", "lint", "package"} {
		if !strings.Contains(string(b), "\n"+verb+": ## ") {
			t.Errorf("no make %s, or one that a bare make does not list", verb)
		}
		if fi, err := os.Stat("../scripts/" + verb); err != nil || fi.Mode()&0o111 == 0 {
			t.Errorf("scripts/%s is not a program: %v", verb, err)
		}
	}
}
