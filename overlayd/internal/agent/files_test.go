package agent

import (
	"bytes"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// mustOpenFiles opens fresh directories, or those given.
func mustOpenFiles(t *testing.T, dir string, log *bytes.Buffer) *files {
	t.Helper()
	f, err := openFiles(filepath.Join(dir, "run"), filepath.Join(dir, "state"), slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.close)
	return f
}

func mustWrite(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestDirectories(t *testing.T) {
	dir := t.TempDir()
	mustOpenFiles(t, dir, new(bytes.Buffer))
	for name, want := range map[string]os.FileMode{"run": 0o755, "state": 0o700} {
		fi, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if fi.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", name, fi.Mode().Perm(), want)
		}
	}
	if _, err := openFiles(filepath.Join(dir, "state", lockFile), filepath.Join(dir, "x"), slog.New(slog.DiscardHandler)); err == nil {
		t.Error("a file was taken for the run directory")
	}
}

func TestOneAgentPerDirectory(t *testing.T) {
	dir := t.TempDir()
	first := mustOpenFiles(t, dir, new(bytes.Buffer))
	for _, d := range []struct{ run, state string }{{"run", "other"}, {"other", "state"}} {
		_, err := openFiles(filepath.Join(dir, d.run), filepath.Join(dir, d.state), slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), "another agent (process ") {
			t.Errorf("directories %v: error %v, want one that names the other agent", d, err)
		}
	}
	first.close()
	mustOpenFiles(t, dir, new(bytes.Buffer))
}

func TestTemporaryFilesRemoved(t *testing.T) {
	dir := t.TempDir()
	f := mustOpenFiles(t, dir, new(bytes.Buffer))
	left := filepath.Join(dir, "state", ".lease.json.123.tmp")
	mustWrite(t, left, "{")
	mustWrite(t, filepath.Join(dir, "state", ".other.123.tmp"), "keep")
	f.close()
	mustOpenFiles(t, dir, new(bytes.Buffer))
	if _, err := os.Stat(left); err == nil {
		t.Error("left over temporary file is still there")
	}
	if _, err := os.Stat(filepath.Join(dir, "state", ".other.123.tmp")); err != nil {
		t.Error("a file that is not ours was removed")
	}
}

func TestIdentity(t *testing.T) {
	t.Run("generated once", func(t *testing.T) {
		dir := t.TempDir()
		f := mustOpenFiles(t, dir, new(bytes.Buffer))
		id, err := f.identity("")
		if err != nil || len(id) != 32 || conf.CheckAgentID(id) != nil {
			t.Fatalf("id %q, %v; want 32 hex digits", id, err)
		}
		again, err := f.identity("")
		if err != nil || again != id {
			t.Errorf("second start: id %q, %v; want %q", again, err, id)
		}
		other, err := mustOpenFiles(t, t.TempDir(), new(bytes.Buffer)).identity("")
		if err != nil || other == id {
			t.Errorf("another host: id %q, %v; want another", other, err)
		}
	})
	t.Run("given, and kept when it is no longer given", func(t *testing.T) {
		f := mustOpenFiles(t, t.TempDir(), new(bytes.Buffer))
		for _, given := range []string{"host-1", ""} {
			if id, err := f.identity(given); err != nil || id != "host-1" {
				t.Errorf("id %q, %v; want host-1", id, err)
			}
		}
	})
	t.Run("given, another stored", func(t *testing.T) {
		var log bytes.Buffer
		f := mustOpenFiles(t, t.TempDir(), &log)
		mustWrite(t, f.id(), "host-1\n")
		if id, err := f.identity("host-2"); err != nil || id != "host-2" {
			t.Errorf("id %q, %v; want host-2", id, err)
		}
		if !strings.Contains(log.String(), "level=WARN") {
			t.Errorf("no warning:\n%s", &log)
		}
	})
	for name, content := range map[string]string{"empty": "", "binary": "\x00\xff\x13", "two lines": "a\nb\n", "too long": strings.Repeat("x", 65)} {
		t.Run("damaged: "+name, func(t *testing.T) {
			f := mustOpenFiles(t, t.TempDir(), new(bytes.Buffer))
			mustWrite(t, f.id(), content)
			id, err := f.identity("")
			if err == nil || !strings.Contains(err.Error(), f.id()) || !strings.Contains(err.Error(), "remove the file") {
				t.Errorf("id %q, error %v; want a sentence that says what to do", id, err)
			}
			if b, _ := os.ReadFile(f.id()); string(b) != content {
				t.Errorf("the file was changed to %q", b)
			}
		})
	}
}

// Whatever lies in lease.json and peers.json, it is used or reported.
func TestStoredFiles(t *testing.T) {
	dir := t.TempDir()
	var log bytes.Buffer
	f := mustOpenFiles(t, dir, &log)
	if _, ok := f.loadLease("own"); ok || log.Len() > 0 {
		t.Errorf("first start: lease from nowhere, or complaints:\n%s", &log)
	}
	lease := savedLease{Lease: testLease(), Renewed: renewal{BootID: "b", Boottime: 5}}
	if err := conf.WriteJSON(f.lease(), lease, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, ok := f.loadLease("own"); !ok || !sameLease(got.Lease, lease.Lease) || got.Renewed != lease.Renewed {
		t.Errorf("lease read back: %v %+v", ok, got)
	}
	peers := savedPeers{AgentID: "own", ClusterID: "c1", Revision: 9, Fields: peerFields(), Peers: []conf.Peer{testPeer("b", 3, 2, "9.0.2.0/24")}}
	if err := conf.WriteJSON(f.peers(), peers, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, ok := f.loadPeers("own", "c1"); !ok || got.Revision != 9 || len(got.Peers) != 1 || !samePeer(got.Peers[0], peers.Peers[0]) {
		t.Errorf("peers read back: %v %+v", ok, got)
	}

	refused := func(what string, ok bool) {
		t.Helper()
		if ok || !strings.Contains(log.String(), "level=WARN") {
			t.Errorf("%s: used: %t, log:\n%s", what, ok, &log)
		}
		log.Reset()
	}
	_, ok := f.loadLease("somebody")
	refused("lease of another agent", ok)
	_, ok = f.loadPeers("somebody", "c1")
	refused("peers of another agent", ok)
	_, ok = f.loadPeers("own", "c2")
	refused("peers of another cluster", ok)
	for name, content := range map[string]string{
		"empty": "", "half": `{"lease":{"agent_id":"ow`, "null": "null", "array": "[]",
		"bad address": `{"lease":{"agent_id":"own","agent_ip":"999.1.1.1"}}`, "zeros": strings.Repeat("\x00", 4096),
		"nothing in it": `{}`, "peer without address": `{"agent_id":"own","cluster_id":"c1","peers":[{"id":"x"}]}`,
	} {
		mustWrite(t, f.lease(), content)
		_, ok := f.loadLease("own")
		refused("lease.json: "+name, ok)
		mustWrite(t, f.peers(), content)
		_, ok = f.loadPeers("own", "c1")
		refused("peers.json: "+name, ok)
	}
}

// An agent that was killed while it started a program leaves its lock to that
// program until it runs.
func TestLockLeftToChild(t *testing.T) {
	dir := t.TempDir()
	first, err := lockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command("cat") // lives until its stdin ends
	child.ExtraFiles = []*os.File{first}
	stdin, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	first.Close()
	if f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR, 0); err != nil || unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		t.Fatalf("the child does not hold the lock (%v)", err)
	}
	time.AfterFunc(100*time.Millisecond, func() { stdin.Close() })
	second, err := lockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
	child.Wait()
}
