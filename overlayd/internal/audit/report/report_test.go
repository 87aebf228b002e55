package report

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
)

// unpack is every file of an archive.
func unpack(t *testing.T, b []byte) map[string]string {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return out
		} else if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		out[h.Name] = string(content)
	}
}

// Secrets planted wherever the report looks are not in it, and the rest is.
func TestReportHasNoSecrets(t *testing.T) {
	run, state, cni := t.TempDir(), t.TempDir(), t.TempDir()
	const secret = "hunter2hunter2"
	for path, content := range map[string]string{
		filepath.Join(run, conf.StateFile):      `{"agent_id": "a1", "coordinators": ["https://user:` + secret + `@10.0.0.1:6440"]}`,
		filepath.Join(state, "lease.json"):      `{"agent_id": "a1"}`,
		filepath.Join(state, "pki", "key.pem"):  "-----BEGIN PRIVATE KEY-----\n" + secret + "\n-----END PRIVATE KEY-----\n",
		filepath.Join(cni, "10-other.conflist"): `{"name": "other", "password": "` + secret + `", "api_key":"` + secret + `", 'secret': '` + secret + `'}`,
		filepath.Join(cni, "11-pem.conf"):       "x\n-----BEGIN EC PRIVATE KEY-----\n" + secret + "\n-----END EC PRIVATE KEY-----\ny\n",
		filepath.Join(cni, "12-args.conf"): "overlayd agent --join-token " + secret + " --join-token=" + secret + "\nOVERLAYD_JOIN_TOKEN=" + secret +
			"\njoin-token: " + secret + "\nAuthorization: Bearer " + secret + "\novl1_" + secret + "_" + secret + "_" + secret + "\n",
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	var seen []string
	err := Write(t.Context(), &b, Options{
		RunDir: run, Dirs: conf.Directories{State: state, CNIConf: cni},
		Documents: map[string]any{"doctor.json": []string{"finding"}, "agents.json": errors.New("no coordinator")},
		Progress:  func(name string) { seen = append(seen, name) },
	})
	if err != nil {
		t.Fatal(err)
	}
	files := unpack(t, b.Bytes())
	for name, content := range files {
		if strings.Contains(content, secret) {
			t.Errorf("%s has the secret:\n%s", name, content)
		}
		if strings.Contains(name, "pki") {
			t.Errorf("%s is there", name)
		}
	}
	for name, want := range map[string]string{
		"overlay-report/doctor.json": "finding", "overlay-report/agents.json": "no coordinator",
		"overlay-report/files" + run + "/state.json":        `"agent_id": "a1"`,
		"overlay-report/files" + cni + "/10-other.conflist": `"name": "other"`,
		"overlay-report/files" + cni + "/11-pem.conf":       "x\n[removed]\ny\n",
		"overlay-report/kernel/links.txt":                   "lo:",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s: %q, want %q in it", name, files[name], want)
		}
	}
	if len(seen) != len(files) {
		t.Errorf("progress told of %d files of %d", len(seen), len(files))
	}
}

// On a host where nothing is published the directory of CNI networks is not known: what
// lies where somebody asks is not taken for it.
func TestReportOfNothingPublished(t *testing.T) {
	here := t.TempDir()
	t.Chdir(here)
	for _, name := range []string{".netrc", "agent-id", "id_ed25519"} {
		if err := os.WriteFile(filepath.Join(here, name), []byte("of somebody else"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	if err := Write(t.Context(), &b, Options{RunDir: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	for name := range unpack(t, b.Bytes()) {
		if strings.Contains(name, here) {
			t.Errorf("%s is there", name)
		}
	}
}
