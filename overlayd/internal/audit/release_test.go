package audit

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
)

// newRelease is a run directory with the store of overlay dcos, open, in which an
// attachment has an address and no interface.
func newRelease(t *testing.T) (runDir string, held *ipam.Store, attach func()) {
	t.Helper()
	runDir = t.TempDir()
	held, err := ipam.Open(t.Context(), ipam.Options{Dir: filepath.Join(runDir, conf.IPAMDir), Overlay: "dcos"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { held.Close() })
	attach = func() {
		t.Helper()
		if _, err := held.Allocate(t.Context(), ipam.Request{Attachment: att, Half: conf.Mesos, Ranges: []netip.Prefix{netip.MustParsePrefix("9.0.1.0/25")}}); err != nil {
			t.Fatal(err)
		}
	}
	attach()
	return runDir, held, attach
}

// awaited returns when somebody waits for the lock of the store.
func awaited(t *testing.T, runDir string) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(runDir, conf.IPAMDir, "dcos.lock"), &st); err != nil {
		t.Fatal(err)
	}
	file := fmt.Sprintf(":%d 0 EOF", st.Ino)
	for until := time.Now().Add(time.Minute); time.Now().Before(until); time.Sleep(time.Millisecond) {
		text, err := os.ReadFile("/proc/locks")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if strings.Contains(line, "-> FLOCK") && strings.Contains(line, file) {
				return
			}
		}
	}
	t.Fatal("nobody waits for the lock")
}

// A container that is attached again between the look and the release keeps its address:
// what is released is decided under the lock.
func TestReleaseOfOneThatComesBack(t *testing.T) {
	for _, force := range []bool{false, true} {
		runDir, held, attach := newRelease(t)
		failed := make(chan error, 1)
		go func() {
			_, err := Release(t.Context(), runDir, att.ContainerID, force)
			failed <- err
		}()
		awaited(t, runDir)
		attach()
		held.Close()
		err := <-failed
		h, rerr := Read(t.Context(), runDir)
		if rerr != nil {
			t.Fatal(rerr)
		}
		left := len(h.Stores["dcos"].Records)
		switch {
		case force && (err != nil || left != 0):
			t.Errorf("--force: %v, %d records left", err, left)
		case !force && (err == nil || !strings.Contains(err.Error(), "attached again") || left != 1):
			t.Errorf("%v, %d records left, want the one that was made again", err, left)
		}
	}
}

// A store that somebody removes meanwhile is not made anew: an empty one would say that
// all addresses are free, of whatever has them.
func TestReleaseMakesNoStore(t *testing.T) {
	runDir, held, _ := newRelease(t)
	failed := make(chan error, 1)
	go func() {
		_, err := Release(t.Context(), runDir, att.ContainerID, true)
		failed <- err
	}()
	awaited(t, runDir)
	file := filepath.Join(runDir, conf.IPAMDir, "dcos.db")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	held.Close()
	if err := <-failed; !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, want fs.ErrNotExist", err)
	}
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is a store: %v", err)
	}
}

// A store that cannot be read is not one without the container.
func TestReleaseOfDamaged(t *testing.T) {
	runDir, held, _ := newRelease(t)
	held.Close()
	if err := os.Truncate(filepath.Join(runDir, conf.IPAMDir, "dcos.db"), 5000); err != nil {
		t.Fatal(err)
	}
	_, err := Release(t.Context(), runDir, att.ContainerID, false)
	if err == nil || !strings.Contains(err.Error(), "dcos") || strings.Contains(err.Error(), "no address store of this host has") {
		t.Errorf("%v, want what is wrong with the store", err)
	}
}
