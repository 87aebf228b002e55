package runtimes

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// host is one set of directories.
type host struct {
	*Files
	bin string
	log *bytes.Buffer
}

func newHost(t *testing.T) host {
	t.Helper()
	dir := t.TempDir()
	h := host{bin: filepath.Join(dir, "bin"), log: new(bytes.Buffer)}
	if err := os.Mkdir(h.bin, 0o755); err != nil {
		t.Fatal(err)
	}
	h.Files = &Files{
		CNIConfDir: filepath.Join(dir, "cni", "net.d"),
		UCRConfDir: filepath.Join(dir, "mesos", "ucr"),
		RunDir:     conf.DefaultRunDir,
		CNIBinDirs: []string{filepath.Join(dir, "absent"), h.bin},
		Log:        slog.New(slog.NewTextHandler(h.log, nil)),
	}
	return h
}

// install puts a plugin into the binary directory that answers VERSION. It
// notes every call, with its environment, in <name>.calls.
func (h host) install(t *testing.T, name, answer string) string {
	t.Helper()
	path := filepath.Join(h.bin, name)
	script := fmt.Sprintf("#!/bin/sh\nenv >> %s.calls\necho run >> %[1]s.calls\n%s\n", path, answer)
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func versions(v ...string) string {
	return fmt.Sprintf(`echo '{"cniVersion":"%s","supportedVersions":["%s"]}'`, v[len(v)-1], strings.Join(v, `","`))
}

func mustSync(t *testing.T, f *Files, overlays ...conf.AgentOverlay) {
	t.Helper()
	if err := f.Sync(t.Context(), overlays); err != nil {
		t.Fatalf("Sync: %v", err)
	}
}

// overlay is one leased overlay with the given bridges.
func overlay(name string, halves ...conf.Half) conf.AgentOverlay {
	subnet := netip.MustParsePrefix("9.0.1.0/24")
	lease := conf.Lease{Bridges: halves, Grants: []conf.Grant{{Overlay: conf.Overlay{Name: name}, Subnet: subnet}}}
	return lease.AgentOverlays(nil)[0]
}

func both(name string) conf.AgentOverlay { return overlay(name, conf.Mesos, conf.Docker) }

func mustRead(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// names lists a directory; none when it is not there.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestContent(t *testing.T) {
	h := newHost(t)
	h.RunDir = "/run/other"
	h.install(t, "d-overlay", versions("0.4.0", "1.0.0", "1.1.0"))
	h.install(t, "portmap", versions("0.4.0", "1.0.0", "1.1.0"))
	mustSync(t, h.Files, both("dcos"))

	wantList := `{
  "cniVersion": "1.0.0",
  "cniVersions": [
    "1.0.0",
    "1.1.0"
  ],
  "name": "dcos",
  "plugins": [
    {
      "type": "d-overlay",
      "overlay": "dcos",
      "runDir": "/run/other",
      "capabilities": {
        "bandwidth": true,
        "ips": true,
        "mac": true,
        "portMappings": true
      },
      "hostPorts": false,
      "ipam": {
        "type": "overlay-ipam"
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
`
	list := filepath.Join(h.CNIConfDir, "87-dcos.conflist")
	if diff := cmp.Diff(wantList, mustRead(t, list)); diff != "" {
		t.Errorf("conflist (-want +got):\n%s", diff)
	}
	wantUCR := `{
  "name": "dcos",
  "type": "m-overlay",
  "overlay": "dcos",
  "runDir": "/run/other",
  "ipam": {
    "type": "overlay-ipam"
  }
}
`
	ucr := filepath.Join(h.UCRConfDir, "dcos.conf")
	if diff := cmp.Diff(wantUCR, mustRead(t, ucr)); diff != "" {
		t.Errorf("UCR file (-want +got):\n%s", diff)
	}
	for _, path := range []string{list, ucr} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o644 {
			t.Errorf("%s: mode %v, %v; want 0644", path, fi.Mode(), err)
		}
	}
}

// The examples are what the agent writes, to the byte.
func TestExamples(t *testing.T) {
	h := newHost(t)
	h.install(t, "d-overlay", versions("1.0.0", "1.1.0"))
	h.install(t, "portmap", versions("1.0.0", "1.1.0"))
	mustSync(t, h.Files, both("dcos"))
	examples := filepath.Join("..", "..", "..", "conf", "examples", "cni")
	for example, written := range map[string]string{
		"87-dcos.conflist": filepath.Join(h.CNIConfDir, "87-dcos.conflist"),
		"ucr-dcos.conf":    filepath.Join(h.UCRConfDir, "dcos.conf"),
	} {
		if diff := cmp.Diff(mustRead(t, filepath.Join(examples, example)), mustRead(t, written)); diff != "" {
			t.Errorf("%s (-example +written):\n%s", example, diff)
		}
	}
	// One that people write themselves.
	list, err := libcni.ConfListFromFile(filepath.Join(examples, "10-ptp-with-overlay-ipam.conflist"))
	if err != nil {
		t.Fatal(err)
	}
	var n conf.NetConf
	if err := json.Unmarshal(list.Plugins[0].Bytes, &n); err != nil {
		t.Fatal(err)
	}
	if n.IPAM.Type != "overlay-ipam" || n.OverlayName() != "dcos" || n.IPAM.Half != conf.Docker {
		t.Errorf("read as %+v", n)
	}
}

// The library that runtimes use reads the list as we mean it.
func TestListLoads(t *testing.T) {
	h := newHost(t)
	h.install(t, "d-overlay", versions("1.0.0", "1.1.0"))
	h.install(t, "portmap", versions("1.0.0", "1.1.0"))
	mustSync(t, h.Files, both("dcos"), both("dcos6"))

	list, err := libcni.LoadConfList(h.CNIConfDir, "dcos6")
	if err != nil {
		t.Fatal(err)
	}
	if list.CNIVersion != "1.1.0" {
		t.Errorf("libcni picks version %s, want 1.1.0", list.CNIVersion)
	}
	var types []string
	for _, p := range list.Plugins {
		types = append(types, p.Network.Type)
	}
	if want := []string{"d-overlay", "portmap"}; !slices.Equal(types, want) {
		t.Errorf("plugins %v, want %v", types, want)
	}
	if strings.Contains(string(list.Bytes), "runDir") {
		t.Errorf("the default run directory is spelled out:\n%s", list.Bytes)
	}
}

func TestVersions(t *testing.T) {
	old, current := versions("0.4.0", "1.0.0"), versions("0.4.0", "1.0.0", "1.1.0")
	for _, tc := range []struct {
		name             string
		overlay, portmap string // what the plugin does on VERSION; empty: not installed
		announced        bool   // 1.1.0
		chained          bool   // portmap is in the list
	}{
		{name: "all new", overlay: current, portmap: current, announced: true, chained: true},
		{name: "Debian's portmap", overlay: current, portmap: old, chained: true},
		{name: "no portmap", overlay: current, announced: true},
		{name: "no plugin at all"},
		{name: "d-overlay not here", portmap: current, chained: true},
		{name: "portmap fails", overlay: current, portmap: "echo broken >&2; exit 1", chained: true},
		{name: "portmap talks nonsense", overlay: current, portmap: "echo hello", chained: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHost(t)
			for name, script := range map[string]string{"d-overlay": tc.overlay, "portmap": tc.portmap} {
				if script != "" {
					h.install(t, name, script)
				}
			}
			mustSync(t, h.Files, both("dcos"))
			list, err := libcni.LoadConfList(h.CNIConfDir, "dcos")
			if err != nil {
				t.Fatal(err)
			}
			if got := list.CNIVersion == "1.1.0"; got != tc.announced {
				t.Errorf("version %s, want 1.1.0 announced: %t", list.CNIVersion, tc.announced)
			}
			if got := len(list.Plugins) == 2; got != tc.chained {
				t.Errorf("%d plugins, want portmap: %t", len(list.Plugins), tc.chained)
			}
		})
	}
}

// TestVersionsOfEveryCopy: a runtime uses the portmap in its own directory, not
// the first that we find.
func TestVersionsOfEveryCopy(t *testing.T) {
	old, current := versions("0.4.0", "1.0.0"), versions("0.4.0", "1.0.0", "1.1.0")
	for _, tc := range []struct {
		name      string
		second    map[string]string // plugins in the second directory; all in the first are current
		announced bool
	}{
		{"one directory", nil, true},
		{"as new in both", map[string]string{"d-overlay": current, "portmap": current}, true},
		{"portmap older in the second", map[string]string{"d-overlay": current, "portmap": old}, false},
		{"d-overlay older in the second", map[string]string{"d-overlay": old}, false},
		{"portmap older where nobody looks for d-overlay", map[string]string{"portmap": old}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHost(t)
			h.install(t, "d-overlay", current)
			h.install(t, "portmap", current)
			second := host{Files: h.Files, bin: t.TempDir()}
			h.CNIBinDirs = append(h.CNIBinDirs, second.bin)
			for name, script := range tc.second {
				second.install(t, name, script)
			}
			mustSync(t, h.Files, both("dcos"))
			if got := strings.Contains(mustRead(t, filepath.Join(h.CNIConfDir, "87-dcos.conflist")), "1.1.0"); got != tc.announced {
				t.Errorf("1.1.0 announced: %t, want %t", got, tc.announced)
			}
		})
	}
}

// A plugin is asked once, with next to no environment, and again when the
// binary has changed.
func TestVersionsAskedOnce(t *testing.T) {
	t.Setenv("SECRET", "do not pass on")
	h := newHost(t)
	path := h.install(t, "d-overlay", versions("1.0.0"))
	calls := func() int { return strings.Count(mustRead(t, path+".calls"), "run\n") }

	mustSync(t, h.Files, both("dcos"), both("dcos6"))
	mustSync(t, h.Files, both("dcos"))
	if n := calls(); n != 1 {
		t.Errorf("asked %d times, want 1", n)
	}
	if env := mustRead(t, path+".calls"); strings.Contains(env, "SECRET") || !strings.Contains(env, "CNI_COMMAND=VERSION") {
		t.Errorf("environment of the plugin:\n%s", env)
	}

	h.install(t, "d-overlay", versions("1.0.0", "1.1.0"))
	mustSync(t, h.Files, both("dcos"))
	if n := calls(); n != 2 {
		t.Errorf("asked %d times after the binary changed, want 2", n)
	}
	if !strings.Contains(mustRead(t, filepath.Join(h.CNIConfDir, "87-dcos.conflist")), "1.1.0") {
		t.Error("the new version is not announced")
	}
}

// A plugin that fails is not asked, and complained about, again and again.
func TestVersionsFailureRemembered(t *testing.T) {
	h := newHost(t)
	path := h.install(t, "d-overlay", "exit 3")
	for range 3 {
		mustSync(t, h.Files, both("dcos"))
	}
	if n := strings.Count(mustRead(t, path+".calls"), "run\n"); n != 1 {
		t.Errorf("asked %d times, want 1", n)
	}
	if n := strings.Count(h.log.String(), "level=WARN"); n != 1 {
		t.Errorf("%d warnings, want 1:\n%s", n, h.log)
	}
}

func TestUntouchedWhenRight(t *testing.T) {
	h := newHost(t)
	mustSync(t, h.Files, both("dcos"))
	paths := []string{filepath.Join(h.CNIConfDir, "87-dcos.conflist"), filepath.Join(h.UCRConfDir, "dcos.conf")}
	inode := func(path string) uint64 {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	before := []uint64{inode(paths[0]), inode(paths[1])}
	mustSync(t, h.Files, both("dcos"))
	if after := []uint64{inode(paths[0]), inode(paths[1])}; !slices.Equal(before, after) {
		t.Error("files were written anew although nothing changed")
	}

	// Edited by somebody: it is still ours, and is put right.
	want := mustRead(t, paths[0])
	if err := os.WriteFile(paths[0], []byte(`{"cniVersion":"0.4.0","name":"dcos","plugins":[{"type":"d-overlay"}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	mustSync(t, h.Files, both("dcos"))
	if diff := cmp.Diff(want, mustRead(t, paths[0])); diff != "" {
		t.Errorf("edited file was not put right (-want +got):\n%s", diff)
	}
}

// Only bridges get files, and what goes takes its own with it, nothing else.
func TestOnlyOurs(t *testing.T) {
	h := newHost(t)
	mustSync(t, h.Files, both("dcos"), overlay("dockeronly", conf.Docker), overlay("mesosonly", conf.Mesos), overlay("none"))
	if diff := cmp.Diff([]string{"87-dcos.conflist", "87-dockeronly.conflist"}, names(t, h.CNIConfDir)); diff != "" {
		t.Errorf("CNI directory (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"dcos.conf", "mesosonly.conf"}, names(t, h.UCRConfDir)); diff != "" {
		t.Errorf("UCR directory (-want +got):\n%s", diff)
	}

	foreign := map[string]string{
		filepath.Join(h.CNIConfDir, "87-podman.conflist"):   `{"cniVersion":"0.4.0","name":"podman","plugins":[{"type":"bridge"}]}`,
		filepath.Join(h.CNIConfDir, "87-empty.conflist"):    ``,
		filepath.Join(h.CNIConfDir, "10-mine.conflist"):     `{"name":"mine","plugins":[{"type":"d-overlay"}]}`,
		filepath.Join(h.CNIConfDir, "87-mine.conf"):         `{"name":"mine","type":"d-overlay"}`,
		filepath.Join(h.UCRConfDir, "other.conf"):           `{"name":"other","type":"bridge"}`,
		filepath.Join(h.UCRConfDir, "mine.json"):            `{"name":"mine","type":"m-overlay"}`,
		filepath.Join(h.UCRConfDir, "averylongname14.conf"): `{"name":"averylongname14","type":"m-overlay"}`,
	}
	for path, content := range foreign {
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	mustSync(t, h.Files)
	left := len(names(t, h.CNIConfDir)) + len(names(t, h.UCRConfDir))
	if left != len(foreign) {
		t.Errorf("%v and %v are left, want the %d files of others", names(t, h.CNIConfDir), names(t, h.UCRConfDir), len(foreign))
	}
	for path, content := range foreign {
		if got := mustRead(t, path); got != content {
			t.Errorf("%s was changed to %q", path, got)
		}
	}
}

// Somebody else's file under our name is reported and stays; the rest goes on.
func TestForeignNameReported(t *testing.T) {
	h := newHost(t)
	if err := os.MkdirAll(h.CNIConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(h.CNIConfDir, "87-dcos.conflist")
	const content = `{"cniVersion":"0.4.0","name":"dcos","plugins":[{"type":"bridge"}]}`
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(h.CNIConfDir, "87-dir.conflist"), 0o755); err != nil {
		t.Fatal(err)
	}
	err := h.Sync(t.Context(), []conf.AgentOverlay{both("dcos"), both("dir"), both("dcos6")})
	for _, want := range []string{path + " was not written by this agent", "87-dir.conflist"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want it to say %q", err, want)
		}
	}
	if got := mustRead(t, path); got != content {
		t.Errorf("the foreign file was changed to %q", got)
	}
	if diff := cmp.Diff([]string{"dcos.conf", "dcos6.conf", "dir.conf"}, names(t, h.UCRConfDir)); diff != "" {
		t.Errorf("UCR directory (-want +got):\n%s", diff)
	}
	if !slices.Contains(names(t, h.CNIConfDir), "87-dcos6.conflist") {
		t.Error("the other overlay got no list")
	}
}

func TestNameThatIsNoFileName(t *testing.T) {
	h := newHost(t)
	if err := h.Sync(t.Context(), []conf.AgentOverlay{both("../evil")}); err == nil || !strings.Contains(err.Error(), "../evil") {
		t.Errorf("error %v, want one about the name", err)
	}
	if got := names(t, filepath.Dir(h.CNIConfDir)); !slices.Equal(got, []string{"net.d"}) {
		t.Errorf("%v beside the directory", got)
	}
}

func TestNoDirectoriesNoFiles(t *testing.T) {
	h := newHost(t)
	cni, ucr := h.CNIConfDir, h.UCRConfDir
	h.CNIConfDir, h.UCRConfDir = "", ""
	mustSync(t, h.Files, both("dcos"))
	if names(t, cni) != nil || names(t, ucr) != nil {
		t.Error("files were written although no directory was given")
	}
}

// Runtimes look into these directories at any moment: Mesos at every regular
// file, others at every name with a CNI suffix.
func TestNoTemporaryFileSeen(t *testing.T) {
	h := newHost(t)
	mustSync(t, h.Files) // makes the directories
	seenCNI, seenUCR := watch(t, h.CNIConfDir), watch(t, h.UCRConfDir)
	mustSync(t, h.Files, both("dcos"))
	if diff := cmp.Diff([]string{"dcos.conf"}, seenUCR()); diff != "" {
		t.Errorf("names seen in the UCR directory (-want +got):\n%s", diff)
	}
	for _, name := range seenCNI() {
		switch filepath.Ext(name) {
		case ".conf", ".conflist", ".json":
			if name != "87-dcos.conflist" {
				t.Errorf("%s was to be seen in the CNI directory", name)
			}
		}
	}
	if got := names(t, filepath.Dir(h.UCRConfDir)); !slices.Equal(got, []string{"ucr"}) {
		t.Errorf("%v left beside the UCR directory", got)
	}
}

// A UCR directory that is a mount point cannot be renamed into from beside it.
func TestUCRDirectoryIsMountPoint(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	h := newHost(t)
	mustSync(t, h.Files)
	runtime.LockOSThread() // never unlocked: the thread with the private mounts dies with this test
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", h.UCRConfDir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(h.UCRConfDir, 0); err != nil {
			t.Error(err)
		}
	})
	mustSync(t, h.Files, both("dcos"))
	if diff := cmp.Diff([]string{"dcos.conf"}, names(t, h.UCRConfDir)); diff != "" {
		t.Errorf("UCR directory (-want +got):\n%s", diff)
	}

	// As under systemd with ProtectSystem=strict and ReadWritePaths=.
	beside := filepath.Dir(h.UCRConfDir)
	if err := unix.Mount(beside, beside, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(beside, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", beside, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	mustSync(t, h.Files, both("dcos"), both("other"))
	if diff := cmp.Diff([]string{"dcos.conf", "other.conf"}, names(t, h.UCRConfDir)); diff != "" {
		t.Errorf("UCR directory below a read-only one (-want +got):\n%s", diff)
	}

	if err := unix.Mount("", h.UCRConfDir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	more := []conf.AgentOverlay{both("dcos"), both("other"), both("third")}
	first, again := h.Sync(t.Context(), more), h.Sync(t.Context(), more)
	if !errors.Is(first, unix.EROFS) || again == nil || first.Error() != again.Error() {
		t.Errorf("Sync into a read-only directory = %v, then %v; want the same error", first, again)
	}
}

// watch returns a function that lists the names which regular files had in dir
// since watch was called, each once.
func watch(t *testing.T, dir string) func() []string {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		t.Fatal(err)
	}
	return func() []string {
		var out []string
		buf := make([]byte, 64*1024)
		n, err := unix.Read(fd, buf)
		if err != nil && !errors.Is(err, unix.EAGAIN) {
			t.Fatal(err)
		}
		for off := 0; off+unix.SizeofInotifyEvent <= n; {
			e := (*unix.InotifyEvent)(unsafe.Pointer(&buf[off]))
			name := buf[off+unix.SizeofInotifyEvent : off+unix.SizeofInotifyEvent+int(e.Len)]
			if s := string(bytes.TrimRight(name, "\x00")); !slices.Contains(out, s) {
				out = append(out, s)
			}
			off += unix.SizeofInotifyEvent + int(e.Len)
		}
		return out
	}
}
