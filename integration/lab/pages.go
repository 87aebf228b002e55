package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Block is one fenced block of a page for people. The first line says what is in it and,
// after that, its mark: who runs it.
//
//	sh test                 TestDocs, at the top of a built tree
//	sh test host            TestDocs, on a host with an agent and containers
//	sh test first           TestDocsWalk, on the coordinator's host, in the order of the page
//	sh test second          TestDocsWalk, on another host
//	    ... daemon          and what it starts goes on
//	sh engines one, two     TestPages of the engines, on one of two hosts with engines
//	sh packages             scripts/packages, on a Debian of its own
//	sh build, hosts, first, second
//	                        scripts/readme
//	sh verbs                TestTreeBlocks: verbs of the Makefile, and scripts
//	sh not-run WORD         nobody: integration/docs_test.go says why
//
// README.md's marks without "test" are those of scripts/readme.
type Block struct {
	Page   string // from the top of the tree
	Line   int
	Lang   string
	Mark   string
	Script string
}

// At is where it stands.
func (b Block) At() string { return fmt.Sprintf("%s:%d", b.Page, b.Line) }

// Blocks are those of all pages for people, in order. top is that of the tree.
func Blocks(top string) ([]Block, error) {
	pages := []string{"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"}
	for _, pattern := range []string{"docs/*.md", "docs/runtimes/*.md"} {
		files, err := filepath.Glob(filepath.Join(top, pattern))
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			page, err := filepath.Rel(top, f)
			if err != nil {
				return nil, err
			}
			pages = append(pages, page)
		}
	}
	slices.Sort(pages)
	var all []Block
	for _, page := range pages {
		text, err := os.ReadFile(filepath.Join(top, page))
		if err != nil {
			return nil, err
		}
		found, err := blocksOf(page, string(text))
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	return all, nil
}

func blocksOf(page, text string) (all []Block, _ error) {
	const fence = "```"
	open := false
	n := 0
	for line := range strings.Lines(text) {
		n++
		bare := strings.TrimSpace(line)
		switch {
		case open && bare == fence:
			open = false
		case open:
			all[len(all)-1].Script += line
		case strings.HasPrefix(bare, fence):
			lang, mark, _ := strings.Cut(strings.TrimPrefix(bare, fence), " ")
			all = append(all, Block{Page: page, Line: n, Lang: lang, Mark: mark})
			open = true
		}
	}
	if open {
		return nil, fmt.Errorf("%s: the block of line %d has no end", page, all[len(all)-1].Line)
	}
	return all, nil
}
