package ipam

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// children are the things a test can have done in another process.
var children = map[string]func() int{
	"mutate":   childMutate,
	"allocate": childAllocate,
	"churn":    childChurn,
	"hold":     childHold,
	"snapshot": childSnapshot,
}

func complain(format string, args ...any) int {
	fmt.Printf(format+"\n", args...)
	return 1
}

// command runs this test binary again as one of the children.
func command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "IPAM_TEST_CHILD="+name)
	return cmd
}

func child(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("child %s: %v\n%s", name, err, tail(out))
	}
	return string(bytes.TrimSpace(out))
}

func tail(b []byte) []byte { return b[:min(len(b), 4000)] }

func childOptions() Options {
	return Options{Dir: os.Args[1], Overlay: "dcos", BootID: "boot-1", Cooling: cooling}
}

func childAllocate() int {
	s, err := Open(context.Background(), childOptions())
	if err != nil {
		return complain("%v", err)
	}
	defer s.Close()
	a, err := s.Allocate(context.Background(), req(os.Args[2], prefixes("9.0.1.0/25")))
	if err != nil {
		return complain("%v", err)
	}
	fmt.Println(a.Addrs[0])
	return 0
}

func TestFiftyProcesses(t *testing.T) {
	b := newBench(t)
	b.o.Now = nil
	var mu sync.Mutex
	seen := map[string]string{}
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			id := fmt.Sprint("c", i)
			out, err := command("allocate", b.o.Dir, id).CombinedOutput()
			mu.Lock()
			defer mu.Unlock()
			addr := strings.TrimSpace(string(out))
			if err != nil {
				t.Errorf("%s: %v %s", id, err, tail(out))
			} else if other := seen[addr]; other != "" {
				t.Errorf("%s was given to %s and %s", addr, other, id)
			}
			seen[addr] = id
		})
	}
	wg.Wait()
	b.with(func(s *Store) {
		st, err := s.Stats(t.Context(), "mesos", prefixes("9.0.1.0/25"))
		if err != nil {
			t.Fatal(err)
		}
		diff(t, "used", st[0].Used, uint64(50))
	})
}

// childChurn allocates and releases until it is killed, and says what it has
// been told.
func childChurn() int {
	ctx := context.Background()
	id := os.Args[2]
	for {
		s, err := Open(ctx, childOptions())
		if err != nil {
			return complain("%v", err)
		}
		a, err := s.Allocate(ctx, req(id, prefixes("9.0.1.0/25")))
		if err != nil {
			return complain("%v", err)
		}
		s.Close()
		fmt.Println("has", a.Addrs[0])
		if s, err = Open(ctx, childOptions()); err != nil {
			return complain("%v", err)
		}
		fmt.Println("gives back")
		if _, err := s.Release(ctx, att(id)); err != nil {
			return complain("%v", err)
		}
		s.Close()
	}
}

// Killed at any instant: the store is whole, and who was told an address and
// did not begin to give it back still has it.
func TestKill(t *testing.T) {
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	b := newBench(t)
	b.o.Now = nil
	for round := range rounds {
		var out [4]bytes.Buffer
		var cmds [4]*exec.Cmd
		for i := range cmds {
			cmds[i] = command("churn", b.o.Dir, fmt.Sprint("w", i))
			cmds[i].Stdout = &out[i]
			if err := cmds[i].Start(); err != nil {
				t.Fatal(err)
			}
		}
		timer := time.NewTimer(time.Duration(15+7*(round%6)) * time.Millisecond)
		<-timer.C
		for _, c := range cmds {
			if err := c.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range cmds {
			if err := c.Wait(); err == nil || c.ProcessState.Exited() {
				t.Fatalf("a child ended by itself: %v", err)
			}
		}
		b.with(func(s *Store) {
			for i := range out {
				lines := strings.Split(strings.TrimSpace(out[i].String()), "\n")
				last := lines[len(lines)-1]
				addr, has := strings.CutPrefix(last, "has ")
				if !has {
					continue
				}
				rec, found, err := s.Get(t.Context(), att(fmt.Sprint("w", i)))
				if err != nil || !found || rec.Addrs[0] != netip.MustParseAddr(addr) {
					t.Errorf("round %d: w%d was told %s, stored is %v %v", round, i, addr, rec.Addrs, err)
				}
			}
		})
	}
}

// An error of a commit says nothing about the commit: when the last step fails,
// after the meta page was written, the address is ours all the same.
func TestCommitErrorIsReadBack(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("needs strace to make a system call fail")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t)
	b.get(req("before", prefixes("9.0.1.0/25")))
	for _, tt := range []struct {
		inject string
		stored bool
	}{
		{"fdatasync:error=EIO:when=1", false},
		{"fdatasync:error=EIO:when=2", true},
		{"pwrite64:error=ENOSPC:when=1+", false},
	} {
		// strace counts for each thread, and Go may change threads between two
		// calls: then nothing fails and it is tried again.
		for try := range 20 {
			id := fmt.Sprint(tt.inject, try)
			cmd := exec.Command(strace, "-f", "-qq", "-e", "trace=fdatasync,pwrite64", "-e", "inject="+tt.inject, exe, b.o.Dir, id)
			cmd.Env = command("allocate").Env
			out, err := cmd.CombinedOutput()
			if !bytes.Contains(out, []byte("(INJECTED)")) {
				if try == 19 {
					t.Skipf("strace injects nothing: %v %s", err, tail(out))
				}
				b.release(id)
				continue
			}
			if (err == nil) != tt.stored {
				t.Errorf("%s: %v\n%s", tt.inject, err, tail(out))
			}
			b.with(func(s *Store) {
				if _, found, err := s.Get(t.Context(), att(id)); err != nil || found != tt.stored {
					t.Errorf("%s: stored: %v, %v", tt.inject, found, err)
				}
			})
			break
		}
	}
}
