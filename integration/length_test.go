package integration

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	maxFile     = 450 // lines
	maxFunction = 70
)

// tooLong are the files and functions (file:function) of the product that are
// longer than they may be, with the length they must not grow beyond. A line
// that is no longer needed is an error.
var tooLong = map[string]int{
	// Contract tests: a file is one list.
}

// TestTreeLengths: a file is read in one sitting, a function fits a screen.
func TestTreeLengths(t *testing.T) {
	needed := map[string]bool{}
	check := func(what string, lines, limit int) {
		if lines <= limit {
			return
		}
		needed[what] = true
		if allowed := tooLong[what]; lines > allowed {
			t.Errorf("%s has %d lines, want at most %d: cut it along its ideas", what, lines, max(limit, allowed))
		}
	}
	for _, p := range packages(t) {
		if within(p.rel(), "integration") {
			continue
		}
		for _, name := range p.GoFiles {
			path := filepath.Join(p.Dir, name)
			source, err := os.ReadFile(path)
			must(t, err)
			rel := p.rel() + "/" + name
			check(rel, bytes.Count(source, []byte("\n")), maxFile)
			fset := token.NewFileSet()
			file, err := parser.ParseFile(fset, path, source, 0)
			must(t, err)
			for _, decl := range file.Decls {
				if f, ok := decl.(*ast.FuncDecl); ok {
					check(fmt.Sprintf("%s:%s", rel, f.Name.Name), 1+fset.Position(f.End()).Line-fset.Position(f.Pos()).Line, maxFunction)
				}
			}
		}
	}
	for what, lines := range tooLong {
		if !needed[what] {
			t.Errorf("tooLong has %s with %d lines, which is no longer so: remove the line", strings.TrimSpace(what), lines)
		}
	}
}
