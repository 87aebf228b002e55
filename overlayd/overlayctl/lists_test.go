package main

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// A list that lacks what cannot be read is not taken for all there is.
func TestUnreadableStoreIsSaid(t *testing.T) {
	runDir := t.TempDir()
	path := filepath.Join(runDir, conf.IPAMDir, "dcos.db")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("damaged", 5000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"containers", "ipam"} {
		code, _, stderr := ctl(t, nil, command, "--run-dir", runDir)
		if code != 1 || !strings.Contains(stderr, "overlay dcos: the address store cannot be read; see overlayctl ipam check") {
			t.Errorf("%s: code %d, stderr %s", command, code, stderr)
		}
	}
}

// A name that is no agent's is said: nothing was given back for it.
func TestNoSuchAgentIsSaid(t *testing.T) {
	url := cluster(t)
	client, err := api.NewClient([]string{url}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Register(t.Context(), api.RegisterRequest{
		AgentID: "host-4", AgentIP: netip.MustParseAddr("172.17.0.5"), Underlay: conf.Underlay{SecondIP: netip.MustParseAddr("fd00::5")}, Version: "1.0",
	}); err != nil {
		t.Fatal(err)
	}
	for name, said := range map[string]bool{
		"host-9": true, "172.17.0.9": true, "fd00::9": true, "host-1": false, "172.17.0.3": false, "::ffff:172.17.0.4": false, "fd00::5": false,
	} {
		code, _, stderr := ctl(t, nil, "agents", "remove", name, "--coordinator", url)
		if code != 0 || strings.Contains(stderr, "no agent has a lease under \""+name+"\": there is nothing to give back") != said || !said && stderr != "" {
			t.Errorf("%s: code %d, stderr %s", name, code, stderr)
		}
	}
	if left, err := client.Agents(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("after all were removed: %v, %v", left, err)
	}
}

// firstLook ends a command that shows something again and again after it has shown it
// twice.
type firstLook struct {
	strings.Builder
	text string
	end  context.CancelFunc
}

func (f *firstLook) Write(b []byte) (int, error) {
	n, err := f.Builder.Write(b)
	if strings.Count(f.String(), f.text) == 2 {
		f.end()
	}
	return n, err
}

// What is shown again as YAML is a document each time: without a line between them lists
// would be one.
func TestWatchYAML(t *testing.T) {
	ctx, end := context.WithCancel(t.Context())
	defer end()
	out := &firstLook{text: "id: host-3", end: end}
	var stderr strings.Builder
	code := run(ctx, []string{"agents", "--watch", "-o", "yaml", "--coordinator", cluster(t)}, func(string) (string, bool) { return "", false }, out, &stderr)
	if code != 0 || strings.Count(out.String(), "---\n") != 2 {
		t.Errorf("code %d, stderr %s\n%s", code, stderr.String(), out.String())
	}
}

// More columns are for people too: a token stands alone on its line, for scripts.
func TestWideIsNoJSON(t *testing.T) {
	coordinator := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := `[]`
		if r.Method == http.MethodPost {
			answer = `{"token": "ovl1_word"}`
		}
		io.WriteString(w, answer)
	}))
	defer coordinator.Close()
	for command, want := range map[string]string{"token create": "ovl1_word\n", "token list": "TOKEN  ROLE", "ca list": "CA  SUBJECT"} {
		code, stdout, stderr := ctl(t, nil, append(strings.Fields(command), "-o", "wide", "--coordinator", coordinator.URL)...)
		if code != 0 || !strings.HasPrefix(stdout, want) {
			t.Errorf("%s: code %d, stderr %s\n%s", command, code, stderr, stdout)
		}
	}
}
