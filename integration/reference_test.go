package integration

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// reference is docs/reference.md by section.
func reference(t *testing.T) map[string]string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(top, "docs/reference.md"))
	must(t, err)
	sections := map[string]string{}
	for _, s := range strings.Split(string(b), "\n## ")[1:] {
		title, text, _ := strings.Cut(s, "\n")
		sections[title] = text
	}
	return sections
}

// shown reports whether text has the word within backquotes.
func shown(text, word string) bool {
	return regexp.MustCompile("`[^`\n]*(^|[^A-Za-z0-9_-])" + regexp.QuoteMeta(word) + "([^A-Za-z0-9_-][^`\n]*)?`").MatchString(strings.ReplaceAll(text, "`", "` `"))
}

// TestTreeReference: docs/reference.md has everything that the source can be
// told, asked or says, each kind in its section.
func TestTreeReference(t *testing.T) {
	sections := reference(t)
	pkgs := packages(t)
	for _, kind := range []struct {
		what, section string
		least         int // how many there are at the very least; fewer means that find looks in the wrong place
		find          func(file *ast.File, path string) []string
	}{
		{"flag", "Command line", 18, flagsIn},
		{"command", "Command line", 10, commandsIn},
		{"configuration key", "Cluster configuration", 12, keysOf("conf", "Network", "Overlay")},
		{"netconf key", "Network configuration of the CNI programs", 12, keysOf("conf", "NetConf", "IPAMConf")},
		{"error code", "Network configuration of the CNI programs", 10, codesIn},
		{"path", "HTTP", 12, pathsIn},
		{"file", "Files", 6, filesIn},
		{"metric", "Metrics", 15, metricsIn},
		{"chain", "Kernel objects", 3, chainsIn},
	} {
		text, ok := sections[kind.section]
		if !ok {
			t.Errorf("docs/reference.md has no section %q", kind.section)
			continue
		}
		found := map[string]bool{}
		for _, p := range pkgs {
			if within(p.rel(), "integration") {
				continue
			}
			for _, name := range p.GoFiles {
				path := p.rel() + "/" + name
				file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, 0)
				must(t, err)
				for _, word := range kind.find(file, path) {
					if !found[word] && !shown(text, word) && !(kind.what == "error code" && strings.Contains(text, "\n| "+word+" |")) {
						t.Errorf("%s: docs/reference.md, section %q, lacks the %s %s", path, kind.section, kind.what, word)
					}
					found[word] = true
				}
			}
		}
		if len(found) < kind.least {
			t.Errorf("found %d of the kind %s, want %d or more: has the source moved?", len(found), kind.what, kind.least)
		}
	}
}

// flagsIn are the names of flags that a file declares: fs.Var(value, "name", ...),
// fs.BoolVar(&to, "name", ...) and the like.
func flagsIn(file *ast.File, path string) (out []string) {
	if !within(path, "overlayd") {
		return nil
	}
	declares := regexp.MustCompile(`^([A-Z][A-Za-z0-9]*)?Var(P|PF)?$`)
	ast.Inspect(file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok || len(call.Args) < 3 {
			return true
		}
		if sel, ok := call.Fun.(*ast.SelectorExpr); ok && declares.MatchString(sel.Sel.Name) {
			if name, ok := text(call.Args[1]); ok {
				out = append(out, "--"+name)
			}
		}
		return true
	})
	return out
}

// commandsIn are the words of Use in cobra's commands.
func commandsIn(file *ast.File, path string) (out []string) {
	if !within(path, "overlayd") {
		return nil
	}
	hidden := map[*ast.CompositeLit]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		lit, ok := n.(*ast.CompositeLit)
		if !ok {
			return true
		}
		use := ""
		for _, e := range lit.Elts {
			kv, ok := e.(*ast.KeyValueExpr)
			if !ok {
				continue
			}
			switch key, _ := kv.Key.(*ast.Ident); {
			case key == nil:
			case key.Name == "Use":
				use, _ = text(kv.Value)
			case key.Name == "Hidden":
				hidden[lit] = true
			}
		}
		if name, _, _ := strings.Cut(use, " "); name != "" && name != "help" && !hidden[lit] {
			out = append(out, name)
		}
		return true
	})
	return out
}

// keysOf are the JSON keys of some structures.
func keysOf(pkg string, names ...string) func(*ast.File, string) []string {
	return func(file *ast.File, path string) (out []string) {
		if filepath.Dir(path) != pkg {
			return nil
		}
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok {
				return true
			}
			s, ok := spec.Type.(*ast.StructType)
			if !ok || !strings.Contains(" "+strings.Join(names, " ")+" ", " "+spec.Name.Name+" ") {
				return false
			}
			for _, f := range s.Fields.List {
				if f.Tag == nil {
					continue
				}
				tag, _ := strconv.Unquote(f.Tag.Value)
				if key, _, _ := strings.Cut(reflect.StructTag(tag).Get("json"), ","); key != "" && key != "-" {
					out = append(out, key)
				}
			}
			return false
		})
		return out
	}
}

// codesIn are the values of the constants ErrCode*.
func codesIn(file *ast.File, path string) (out []string) {
	if !within(path, "internal/cni") {
		return nil
	}
	eachConst(file, func(name, value string) {
		if strings.HasPrefix(name, "ErrCode") {
			out = append(out, value)
		}
	})
	return out
}

// pathsIn are the paths of our HTTP servers, with or without a method.
func pathsIn(file *ast.File, path string) (out []string) {
	if !within(path, "overlayd/internal/api", "overlayd/internal/coordinator", "overlayd/internal/agent", "overlayd/internal/serve") {
		return nil
	}
	is := regexp.MustCompile(`^((GET|POST|PUT|PATCH|DELETE) )?(/(v1|overlay-master|overlay-agent)/[A-Za-z0-9_/{}-]+|/healthz|/readyz|/metrics)$`)
	eachText(file, func(s string) {
		if m := is.FindStringSubmatch(s); m != nil {
			out = append(out, m[3])
		}
	})
	return out
}

// filesIn are the values of constants that name files.
func filesIn(file *ast.File, path string) (out []string) {
	if !within(path, "conf", "ipam", "overlayd") {
		return nil
	}
	eachConst(file, func(name, value string) {
		if (strings.HasSuffix(name, "File") || strings.HasSuffix(name, "FileName")) && regexp.MustCompile(`^[a-z][a-z0-9-]*(\.[a-z]+)?$`).MatchString(value) {
			out = append(out, value)
		}
	})
	return out
}

// metricsIn are the names of metrics.
func metricsIn(file *ast.File, path string) (out []string) {
	if !within(path, "overlayd") {
		return nil
	}
	is := regexp.MustCompile(`^overlay_[a-z]+_[a-z_0-9]+$`)
	eachText(file, func(s string) {
		if is.MatchString(s) {
			out = append(out, s)
		}
	})
	return out
}

// chainsIn are the names of our firewall chains.
func chainsIn(file *ast.File, path string) (out []string) {
	if !within(path, "internal/mark") {
		return nil
	}
	eachConst(file, func(_, value string) {
		if strings.HasPrefix(value, "OVERLAY-") {
			out = append(out, value)
		}
	})
	return out
}

// eachConst calls f for every constant that is one literal.
func eachConst(file *ast.File, f func(name, value string)) {
	for _, decl := range file.Decls {
		d, ok := decl.(*ast.GenDecl)
		if !ok || d.Tok != token.CONST {
			continue
		}
		for _, spec := range d.Specs {
			v := spec.(*ast.ValueSpec)
			for i, value := range v.Values {
				if lit, ok := value.(*ast.BasicLit); ok {
					s := lit.Value
					if unquoted, err := strconv.Unquote(s); err == nil {
						s = unquoted
					}
					f(v.Names[i].Name, s)
				}
			}
		}
	}
}

// eachText calls f for every string in the source.
func eachText(file *ast.File, f func(string)) {
	ast.Inspect(file, func(n ast.Node) bool {
		if e, ok := n.(*ast.BasicLit); ok {
			if s, ok := text(e); ok {
				f(s)
			}
		}
		return true
	})
}

// text is the value of a string literal.
func text(e ast.Expr) (string, bool) {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(lit.Value)
	return s, err == nil
}

// TestReferenceDefaults: the defaults that the programs print stand in
// docs/reference.md beside the flag.
func TestReferenceDefaults(t *testing.T) {
	text := reference(t)["Command line"]
	for _, command := range []string{"coordinator", "agent"} {
		help, status := program(t, "overlayd", command, "--help")
		flags := regexp.MustCompile(`(?m)^ +(?:-\w, )?(--[a-z0-9-]+).*?(?:\(default (\S+)\))?$`).FindAllStringSubmatch(help, -1)
		if status != 0 || len(flags) < 3 {
			t.Errorf("overlayd %s --help: status %d:\n%s", command, status, help)
		}
		for _, f := range flags {
			if f[1] == "--help" {
				continue
			}
			row := regexp.MustCompile("(?m)^\\| `"+f[1]+"[ `].*$").FindAllString(text, -1)
			if len(row) == 0 || f[2] != "" && !strings.Contains(fmt.Sprint(row), f[2]) {
				t.Errorf("docs/reference.md lacks %s of overlayd %s, or its default %q: %s", f[1], command, f[2], row)
			}
		}
	}
}

// TestConfigurationGuide: docs/configuration.md says of every configuration key how
// to choose it. A new key needs a sentence there.
func TestConfigurationGuide(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(top, "docs/configuration.md"))
	must(t, err)
	found := 0
	for _, p := range packages(t) {
		if p.rel() != "conf" {
			continue
		}
		for _, name := range p.GoFiles {
			file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, 0)
			must(t, err)
			for _, key := range keysOf("conf", "Network", "Overlay")(file, p.rel()+"/"+name) {
				found++
				if key != "overlays" && key != "draining" && !shown(string(b), key) { // draining is in no file
					t.Errorf("docs/configuration.md says nothing of %s", key)
				}
			}
		}
	}
	if found < 12 {
		t.Errorf("found %d keys; have they moved?", found)
	}
}
