package coordinator_test

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/page"
	"overlayd.internal/overlay/overlayd/internal/pki"
)

// fetch asks for a path and returns the status, what the answer begins with, and
// its type. A stream is not read to its end.
func fetch(t *testing.T, client *http.Client, method, url string) (code int, text, kind string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	kind = resp.Header.Get("Content-Type")
	if strings.HasPrefix(kind, "text/event-stream") {
		return resp.StatusCode, "", kind
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b), kind
}

// Who sees the page, with what it reads, and what stays closed when it is public.
func TestPageAccess(t *testing.T) {
	open := append([]string{page.Path, "/page/app.js", "/page/style.css"}, page.Reads()...)
	closed := []string{api.PathMasterState, api.PathBackup, api.PathMetrics, api.PathTokens, api.PathCA, "/elsewhere"}
	for _, public := range []bool{false, true} {
		n := secure(t, func(_ *pki.Options, o *coordinator.Options) { o.PagePublic = public })
		nobody, agent, reader := as(t), n.agent(t, "a").Client2(), n.join(t, "r", n.token(t, api.TokenRequest{Role: string(pki.RoleReader)})).Client2()
		want := map[bool]int{false: http.StatusUnauthorized, true: http.StatusOK}[public]
		for _, path := range open {
			code, text, _ := fetch(t, nobody, "GET", n.url+path)
			if code != want {
				t.Errorf("public %v: nobody gets %s: %d %.200s", public, path, code, text)
			}
			if code == http.StatusUnauthorized && (!strings.Contains(text, "overlayctl page") || !json.Valid([]byte(text))) {
				t.Errorf("nobody gets %s: %s", path, text)
			}
			if code, text, _ := fetch(t, reader, "GET", n.url+path); code != http.StatusOK {
				t.Errorf("public %v: a reader gets %s: %d %.200s", public, path, code, text)
			}
			if code, _, _ := fetch(t, agent, "GET", n.url+path); (code == http.StatusOK) != public {
				t.Errorf("public %v: an agent gets %s: %d", public, path, code)
			}
			for _, method := range []string{"POST", "PUT", "DELETE"} {
				if code, _, _ := fetch(t, nobody, method, n.url+path); code/100 == 2 {
					t.Errorf("public %v: %s %s: %d", public, method, path, code)
				}
			}
		}
		_, text, _ := fetch(t, reader, "GET", n.url+api.PathOpenAPI)
		var d description
		if err := json.Unmarshal([]byte(text), &d); err != nil {
			t.Fatal(err)
		}
		for _, path := range page.Reads() {
			if role, want := d.Paths[path]["get"].Role, map[bool]string{false: "reader", true: "public"}[public]; role != want {
				t.Errorf("public %v: %s is described to be for: %s, want %s", public, path, role, want)
			}
		}
		for _, path := range closed {
			if code, _, _ := fetch(t, nobody, "GET", n.url+path); code != http.StatusUnauthorized {
				t.Errorf("public %v: nobody gets %s: %d", public, path, code)
			}
		}
		if _, text, kind := fetch(t, reader, "GET", n.url+page.Path); kind != "text/html; charset=utf-8" || !strings.Contains(text, "/page/app.js") {
			t.Errorf("the page is %s: %.100s", kind, text)
		}
	}
}
