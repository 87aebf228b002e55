package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// quickly waits for what has to be within a second.
func quickly(t *testing.T, what string, f func() error) {
	t.Helper()
	begun := time.Now()
	eventually(t, what, f)
	if took := time.Since(begun); took > time.Second {
		t.Errorf("%s took %s, want a second at most", what, took)
	}
}

// Whatever somebody does to the published document or the runtimes' files, they
// are back within a second.
func TestDocumentPutBack(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	h := newHost(c)
	h.start()
	h.ready()
	path, list := h.path(conf.StateFile), filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist")
	want, err := os.ReadFile(path)
	must(t, err)
	wantList, err := os.ReadFile(list)
	must(t, err)
	whole := func() error {
		b, err := conf.ReadRegular(path, conf.MaxStateFile)
		l, err2 := conf.ReadRegular(list, conf.MaxStateFile)
		if err := errors.Join(err, err2); err != nil {
			return err
		}
		if string(b) != string(want) || string(l) != string(wantList) {
			return errors.New("they hold " + string(b) + string(l))
		}
		return nil
	}
	for _, fault := range []struct {
		name string
		do   func() error
	}{
		{"removed", func() error { return os.Remove(path) }},
		{"replaced", func() error {
			return errors.Join(os.WriteFile(path+".x", []byte("{}"), 0o644), os.Rename(path+".x", path))
		}},
		{"written", func() error {
			return os.WriteFile(path, []byte(strings.Replace(string(want), "9.0.", "9.9.", 1)), 0o644)
		}},
		{"emptied", func() error { return os.Truncate(path, 0) }},
		{"a FIFO in its place", func() error { return errors.Join(unix.Mkfifo(path+".x", 0o644), os.Rename(path+".x", path)) }},
		{"a list removed", func() error { return os.Remove(list) }},
		{"a list replaced", func() error { return os.WriteFile(list, []byte("{}"), 0o644) }},
	} {
		must(t, fault.do())
		if fault.name == "a list replaced" {
			// It no longer looks as if we had written it.
			h.notReady("was not written by this agent")
			must(t, os.Remove(list))
		}
		quickly(t, fault.name, whole)
	}
	h.ready()

	// A directory cannot be replaced by a file. It stays, and is reported.
	odd := t.TempDir()
	must(t, os.Mkdir(filepath.Join(odd, "directory"), 0o755))
	must(t, unix.Renameat2(unix.AT_FDCWD, odd, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)) // one that has gone is written anew
	h.notReady("the state cannot be published")
	must(t, exists(filepath.Join(path, "directory"), true))
	must(t, os.RemoveAll(path))
	quickly(t, "the directory has gone", whole)
	h.ready()
}

// Files under our names that nobody could mean are reported, neither waited for
// nor read.
func TestFilesThatAreNone(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	c := newCluster(t, seedNetwork())
	c.join("peer", "172.17.0.3")
	h := newHost(c)
	h.start()
	h.ready()
	before := h.document()
	kinds := map[string]func(string) error{
		"FIFO":      func(path string) error { return unix.Mkfifo(path, 0o600) },
		"device":    func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 5))) }, // /dev/zero
		"huge file": func(path string) error { return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 1<<40)) },
	}
	for kind, put := range kinds {
		h.stop()
		for _, path := range []string{h.stored(leaseFile), h.stored(peersFile), h.path(conf.StateFile)} {
			must(t, os.RemoveAll(path))
			must(t, put(path))
		}
		h.start()
		h.ready()
		if got := h.document(); got.AgentID != before.AgentID || got.Lease.Epoch != before.Lease.Epoch {
			t.Errorf("%s: published %+v, want the lease of before", kind, got)
		}
		eventually(t, "peer", func() error { return hasRoute(prefix("9.0.0.0/24")) })
		list := filepath.Join(h.opts.CNIConfDir, "87-dcos.conflist")
		// At once: one that has gone is written anew.
		odd := filepath.Join(t.TempDir(), "odd")
		must(t, put(odd))
		must(t, os.Rename(odd, list))
		h.notReady(list)
		must(t, os.Remove(list))
		h.ready()
	}
	for kind, put := range kinds {
		h.stop()
		id, err := os.ReadFile(h.stored(idFile))
		must(t, err)
		must(t, os.Remove(h.stored(idFile)))
		must(t, put(h.stored(idFile)))
		mustNotStart(t, h.opts, "read the agent id")
		must(t, os.Remove(h.stored(idFile)))
		must(t, os.WriteFile(h.stored(idFile), id, 0o600))
		_ = kind
		h.start()
	}
}
