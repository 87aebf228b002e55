// Package page is what a person sees of the cluster in a browser: a few files of
// HTML, CSS and JavaScript, embedded as they are written, and nothing else. They
// ask the read API of the same server; no request leaves the host.
package page

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net/http"
	"path"
	"strings"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// Path is where the page is served; what belongs to it lies below assetsPath.
const (
	Path       = "/"
	assetsPath = "/page/"
	index      = "index.html"
)

// policy lets the page load what this server has, and nothing inline: a name that
// found its way into the document as HTML would still not run.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

//go:embed assets
var assets embed.FS

// types are those of the files, so that what is served does not depend on the
// tables of the host.
func typeOf(name string) string {
	switch path.Ext(name) {
	case ".html":
		return "text/html; charset=utf-8"
	case ".js":
		return "text/javascript; charset=utf-8"
	case ".css":
		return "text/css; charset=utf-8"
	case ".svg":
		return "image/svg+xml"
	}
	return "application/octet-stream"
}

// Routes serve the page.
func Routes() []serve.Route {
	entries, err := fs.ReadDir(assets, "assets")
	if err != nil {
		panic(err) // it is part of the program
	}
	files := map[string]serve.Handler{}
	for _, e := range entries {
		body, err := fs.ReadFile(assets, "assets/"+e.Name())
		if err != nil {
			panic(err)
		}
		files[e.Name()] = file(e.Name(), body)
	}
	return []serve.Route{
		{Method: http.MethodGet, Path: Path, Handler: files[index]},
		{Method: http.MethodGet, Path: assetsPath + "{file}", Handler: func(w http.ResponseWriter, r *http.Request) error {
			name := r.PathValue("file")
			h, ok := files[name]
			if !ok {
				return serve.Refuse(http.StatusNotFound, "the page has no file %.80q", name)
			}
			return h(w, r)
		}},
	}
}

// Reads are the paths of the API that the page asks, all with GET.
func Reads() []string {
	return []string{api.PathAgents, api.PathOverlays, api.PathContainers, api.PathAddresses, api.PathEvents}
}

// Belongs reports whether a path is of the page, or one that it reads.
func Belongs(p string) bool {
	if p == Path || strings.HasPrefix(p, assetsPath) {
		return true
	}
	for _, r := range Reads() {
		if p == r {
			return true
		}
	}
	return false
}

// file serves one file, which the browser keeps and asks about again.
func file(name string, body []byte) serve.Handler {
	sum := sha256.Sum256(body)
	tag := `"` + hex.EncodeToString(sum[:12]) + `"`
	kind := typeOf(name)
	return func(w http.ResponseWriter, r *http.Request) error {
		Guard(w.Header())
		w.Header().Set("ETag", tag)
		w.Header().Set("Cache-Control", "no-cache")
		if strings.Contains(r.Header.Get("If-None-Match"), tag) {
			w.WriteHeader(http.StatusNotModified)
			return nil
		}
		w.Header().Set("Content-Type", kind)
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		serve.LimitAnswer(w, len(body))
		w.Write(body) // an error means that the client is gone
		return nil
	}
}

// Guard sets the headers that keep a browser from doing more with an answer than
// the page needs.
func Guard(h http.Header) {
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("X-Frame-Options", "DENY")
}
