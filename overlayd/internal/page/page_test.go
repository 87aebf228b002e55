package page_test

import (
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/page"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

func handler() http.Handler {
	return serve.API{Name: "a test", Routes: page.Routes(), Log: slog.New(slog.DiscardHandler)}.Handler()
}

func get(h http.Handler, path string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, path, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// sources are the files of the page by name.
func sources(t *testing.T) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir("assets", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		files[filepath.Base(path)] = string(b)
		return err
	})
	if err != nil || len(files) < 10 {
		t.Fatalf("%d files: %v", len(files), err)
	}
	return files
}

// Every file is served, with a type of its own and the headers that fence it in.
func TestServed(t *testing.T) {
	h := handler()
	types := map[string]string{".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
	for name, text := range sources(t) {
		path := "/page/" + name
		if name == "index.html" {
			path = "/"
		}
		w := get(h, path)
		if w.Code != http.StatusOK || w.Body.String() != text || w.Header().Get("Content-Type") != types[filepath.Ext(name)] {
			t.Errorf("GET %s: %d, %s, %d bytes of %d", path, w.Code, w.Header().Get("Content-Type"), w.Body.Len(), len(text))
		}
		policy := w.Header().Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"} {
			if !strings.Contains(policy, want) {
				t.Errorf("GET %s: the policy %q lacks %s", path, policy, want)
			}
		}
		if strings.Contains(policy, "unsafe") || w.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("GET %s: %v", path, w.Header())
		}
		again := get(h, path, "If-None-Match", w.Header().Get("ETag"))
		if again.Code != http.StatusNotModified || again.Body.Len() != 0 {
			t.Errorf("GET %s again: %d with %d bytes", path, again.Code, again.Body.Len())
		}
	}
	for _, path := range []string{"/page/", "/page/none.js", "/page/..%2fpage.go", "/page/assets/app.js"} {
		if w := get(h, path); w.Code != http.StatusNotFound {
			t.Errorf("GET %s: %d %s", path, w.Code, w.Body)
		}
	}
}

// The document asks for nothing that is not here, and has nothing in it that the
// policy would keep from working.
func TestSelfContained(t *testing.T) {
	files := sources(t)
	index := files["index.html"]
	refs := regexp.MustCompile(`(?:src|href)="([^"#][^"]*)"`).FindAllStringSubmatch(index, -1)
	if len(refs) < 10 {
		t.Errorf("index.html refers to %d files; has it changed?", len(refs))
	}
	for _, m := range refs {
		name, ok := strings.CutPrefix(m[1], "/page/")
		if _, found := files[name]; !ok || !found {
			t.Errorf("index.html refers to %s", m[1])
		}
	}
	for name, text := range files {
		for _, m := range regexp.MustCompile(`from '\./([^']+)'`).FindAllStringSubmatch(text, -1) {
			if _, found := files[m[1]]; !found {
				t.Errorf("%s imports %s, which is not there", name, m[1])
			}
			if !strings.Contains(index, `modulepreload" href="/page/`+m[1]) {
				t.Errorf("index.html does not preload %s, which %s imports", m[1], name)
			}
		}
		for what, is := range map[string]string{
			"an address elsewhere":      `(https?:)?//[a-z0-9-]+\.[a-z]`,
			"HTML made of text":         `innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc`,
			"code made of text":         `\beval\(|new Function|setTimeout\('|javascript:`,
			"style in the document":     `(?i)<style|\sstyle=|setAttribute\('style'|[{ ]style: `,
			"a script in the document":  `(?i)<script>|<[^>]*\son[a-z]+="`,
			"something of another site": `@import|url\(`,
		} {
			if strings.HasSuffix(name, ".svg") {
				text = strings.ReplaceAll(text, `xmlns="http://www.w3.org/2000/svg"`, "")
			}
			if m := regexp.MustCompile(is).FindString(text); m != "" {
				t.Errorf("%s has %s: %s", name, what, m)
			}
		}
		if n := strings.Count(text, "\n"); n > 450 {
			t.Errorf("%s has %d lines", name, n)
		}
	}
}

func TestBelongs(t *testing.T) {
	for path, want := range map[string]bool{
		"/": true, "/page/app.js": true, "/v1/agents": true, "/v1/events": true, "/v1/containers": true,
		"/v1/backup": false, "/v1/tokens": false, "/v1/agents/prune": false, "/pages": false, "/metrics": false,
	} {
		if page.Belongs(path) != want {
			t.Errorf("Belongs(%q) is %v", path, !want)
		}
	}
}

// The units that the page names are those that the packages install.
func TestUnits(t *testing.T) {
	named := 0
	for name, text := range sources(t) {
		for _, m := range regexp.MustCompile(`systemctl [a-z]+ ([a-z-]+)`).FindAllStringSubmatch(text, -1) {
			named++
			if _, err := os.Stat(filepath.Join("../../../conf/examples/systemd", m[1]+".service")); err != nil {
				t.Errorf("%s names a unit: %v", name, err)
			}
		}
	}
	if named < 2 {
		t.Errorf("%d units are named; has it changed?", named)
	}
}
