package runtimes

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kept starts a Keeper that never looks by itself within a test, and collects
// its results.
func kept(t *testing.T, h host) (k *Keeper, results func() []string) {
	t.Helper()
	k = NewKeeper(*h.Files, time.Hour)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	got := make(chan string, 1000)
	go func() { done <- k.Run(ctx) }()
	go func() {
		for {
			select {
			case err := <-k.Done():
				got <- errorText(err)
			case <-ctx.Done():
				return
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	var all []string
	return k, func() []string {
		for {
			select {
			case text := <-got:
				all = append(all, text)
			default:
				return all
			}
		}
	}
}

func within(t *testing.T, limit time.Duration, what string, f func() error) {
	t.Helper()
	begun := time.Now()
	for {
		err := f()
		if took := time.Since(begun); err == nil {
			if took > limit {
				t.Errorf("%s: took %s", what, took)
			}
			return
		} else if took > 10*time.Second {
			t.Fatalf("%s: %v", what, err)
		}
		sleep(t.Context(), 5*time.Millisecond)
	}
}

// Whatever somebody does to a file of ours, it is back within a second, content
// included.
func TestKeeperPutsBack(t *testing.T) {
	h := newHost(t)
	h.install(t, "d-overlay", versions("1.0.0", "1.1.0"))
	k, _ := kept(t, h)
	k.Set([]conf.AgentOverlay{both("dcos")})
	list, ucr := filepath.Join(h.CNIConfDir, "87-dcos.conflist"), filepath.Join(h.UCRConfDir, "dcos.conf")
	want := map[string]string{}
	within(t, time.Minute, "the first files", func() error {
		for _, path := range []string{list, ucr} {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			want[path] = string(b)
		}
		return nil
	})
	whole := func() error {
		for path, content := range want {
			if b, err := os.ReadFile(path); err != nil || string(b) != content {
				return errors.Join(err, errors.New(path+" holds "+string(b)))
			}
		}
		return nil
	}
	check := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	other := strings.Replace(want[list], "overlay-ipam", "host-local", 1)
	for _, fault := range []struct {
		name string
		do   func()
	}{
		{"removed", func() { check(os.Remove(list), os.Remove(ucr)) }},
		{"written anew", func() { check(os.WriteFile(list, []byte(other), 0o644)) }},
		{"replaced", func() {
			check(os.WriteFile(list+".x", []byte(other), 0o644), os.Rename(list+".x", list))
		}},
		{"moved away", func() { check(os.Rename(list, list+".bak")) }},
		{"appended to", func() {
			f, err := os.OpenFile(ucr, os.O_APPEND|os.O_WRONLY, 0)
			check(err)
			_, err = f.WriteString(" \n")
			check(err, f.Close())
		}},
		{"directories removed", func() { check(os.RemoveAll(h.CNIConfDir), os.RemoveAll(filepath.Dir(h.UCRConfDir))) }},
		{"removed again", func() { check(os.Remove(list), os.Remove(ucr)) }},
		{"directory moved away", func() { check(os.Rename(h.CNIConfDir, h.CNIConfDir+"2")) }},
		{"and removed in the new one", func() { check(os.Remove(list)) }},
	} {
		fault.do()
		within(t, time.Second, fault.name, whole)
	}
}

// What cannot be put back is said once, stays as it is, and is put back when it
// can be.
func TestKeeperSaysWhatItCannot(t *testing.T) {
	for _, tc := range []struct {
		name, want string
		put        func(t *testing.T, path string) error
	}{
		{"a directory", "no regular file", func(t *testing.T, path string) error { return os.MkdirAll(filepath.Join(path, "sub"), 0o755) }},
		{"a FIFO", "no regular file", func(t *testing.T, path string) error { return unix.Mkfifo(path, 0o644) }},
		{"a huge file", "move it away", func(t *testing.T, path string) error {
			return errors.Join(os.WriteFile(path, nil, 0o644), os.Truncate(path, 2*maxFile))
		}},
		{"a file of somebody else", "was not written by this agent", func(t *testing.T, path string) error {
			return os.WriteFile(path, []byte(`{"plugins":[{"type":"bridge"}]}`), 0o644)
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHost(t)
			k, results := kept(t, h)
			k.Set([]conf.AgentOverlay{both("dcos"), both("two")})
			list, other := filepath.Join(h.CNIConfDir, "87-dcos.conflist"), filepath.Join(h.CNIConfDir, "87-two.conflist")
			there := func(path string) func() error {
				return func() error {
					fi, err := os.Lstat(path)
					if err == nil && (!fi.Mode().IsRegular() || !strings.Contains(mustRead(t, path), "d-overlay")) {
						err = errors.New("it is another")
					}
					return err
				}
			}
			within(t, time.Minute, "the first files", func() error { return errors.Join(there(list)(), there(other)()) })
			odd := filepath.Join(t.TempDir(), "odd")
			// At once: one that has gone is written anew.
			if err := errors.Join(tc.put(t, odd), unix.Renameat2(unix.AT_FDCWD, odd, unix.AT_FDCWD, list, unix.RENAME_EXCHANGE)); err != nil {
				t.Fatal(err)
			}
			within(t, 2*time.Second, "said", func() error {
				all := append([]string{""}, results()...)
				if last := all[len(all)-1]; !strings.Contains(last, tc.want) || !strings.Contains(last, list) {
					return errors.New(last)
				}
				return nil
			})
			if there(list)() == nil {
				t.Error("it was replaced")
			}
			if err := os.Remove(other); err != nil {
				t.Fatal(err)
			}
			within(t, time.Second, "the other file", there(other))
			if err := os.RemoveAll(list); err != nil {
				t.Fatal(err)
			}
			within(t, time.Second, "put back", there(list))
			within(t, time.Second, "said to be fine", func() error {
				all := append([]string{"nothing yet"}, results()...)
				if last := all[len(all)-1]; last != "" {
					return errors.New(last)
				}
				return nil
			})
			if n := len(results()); n > 4 {
				t.Errorf("%d results, want one for each change: %q", n, results())
			}
		})
	}
}

// A plugin that does not answer VERSION holds up nobody but the files.
func TestKeeperDoesNotBlock(t *testing.T) {
	h := newHost(t)
	h.install(t, "d-overlay", "exec sleep 3600")
	k, _ := kept(t, h)
	begun := time.Now()
	for range 100 {
		k.Set([]conf.AgentOverlay{both("dcos")})
		k.Set(nil)
	}
	if took := time.Since(begun); took > time.Second {
		t.Errorf("Set took %s", took)
	}
}
