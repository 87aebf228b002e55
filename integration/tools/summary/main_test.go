package main

import (
	"strings"
	"testing"
)

func TestSummarise(t *testing.T) {
	pass := `{"Action":"output","Package":"p","Test":"TestA","Output":"=== RUN TestA\n"}
{"Action":"pass","Package":"p","Test":"TestA"}
{"Action":"output","Package":"p","Output":"PASS\n"}
{"Action":"output","Package":"p","Output":"ok  \tp\t0.1s\n"}
{"Action":"pass","Package":"p"}
`
	skip := `{"Action":"output","Package":"p","Test":"TestS","Output":"    s_test.go:7: needs root\n"}
{"Action":"output","Package":"p","Test":"TestS","Output":"--- SKIP: TestS (0.00s)\n"}
{"Action":"skip","Package":"p","Test":"TestS"}
`
	for _, c := range []struct {
		name   string
		in     string
		strict bool
		ok     bool
		want   []string
	}{
		{"passed", pass, true, true, []string{"ok  \tp\t0.1s\n\n1 passed, 0 failed, 0 skipped\n"}},
		{"skipped", pass + skip, false, true, []string{"1 passed, 0 failed, 1 skipped\n", "  skipped: p TestS: needs root\n"}},
		{"skipped in CI", pass + skip, true, false, []string{"nothing may be skipped"}},
		{"failed", pass + `{"Action":"output","Package":"p","Test":"TestB","Output":"    b_test.go:3: wrong\n"}
{"Action":"fail","Package":"p","Test":"TestB"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p"}
`, false, false, []string{"b_test.go:3: wrong\n", "FAIL\tp", "1 passed, 1 failed", "  failed: p TestB: b_test.go:3: wrong\n"}},
		{"panic in a test", `{"Action":"output","Package":"p","Test":"TestC","Output":"panic: oh\n"}
{"Action":"output","Package":"p","Output":"FAIL\tp\t0.1s\n"}
{"Action":"fail","Package":"p"}
`, false, false, []string{"panic: oh\n", "failed: p TestC: did not end"}},
		{"package fails without a test", pass + `{"Action":"output","Package":"q","Output":"cannot build binaries\n"}
{"Action":"fail","Package":"q"}
`, false, false, []string{"cannot build binaries\n", "failed: q\n"}},
		{"does not build", pass + `{"ImportPath":"q","Action":"build-output","Output":"q.go:1: syntax\n"}
{"ImportPath":"q","Action":"build-fail"}
`, false, false, []string{"q.go:1: syntax\n", "failed: q: does not build\n"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out strings.Builder
			ok, err := summarise(strings.NewReader(c.in), &out, c.strict)
			if err != nil || ok != c.ok {
				t.Errorf("ok = %v, err = %v; want ok = %v", ok, err, c.ok)
			}
			for _, w := range c.want {
				if !strings.Contains(out.String(), w) {
					t.Errorf("missing %q in:\n%s", w, out.String())
				}
			}
		})
	}

	if ok, err := summarise(strings.NewReader(""), &strings.Builder{}, false); ok || err == nil {
		t.Errorf("nothing ran: ok = %v, err = %v", ok, err)
	}
}
