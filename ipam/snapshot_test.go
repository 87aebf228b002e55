package ipam

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
)

// childHold opens the store, says so, and keeps it until its input ends.
func childHold() int {
	s, err := Open(context.Background(), childOptions())
	if err != nil {
		return complain("%v", err)
	}
	defer s.Close()
	fmt.Println("held")
	bufio.NewReader(os.Stdin).ReadByte()
	return 0
}

// childSnapshot is childHold of a snapshot.
func childSnapshot() int {
	s, err := TakeSnapshot(context.Background(), childOptions())
	if err != nil {
		return complain("%v", err)
	}
	defer s.Close()
	fmt.Println("held")
	bufio.NewReader(os.Stdin).ReadByte()
	return 0
}

// stopped is the pid of a child that has done what its name says and was stopped.
func stopped(t *testing.T, name, dir string) int {
	t.Helper()
	cmd := command(name, dir)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGCONT)
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "held\n" {
		t.Fatalf("%q, %v", line, err)
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var status syscall.WaitStatus
	if _, err := syscall.Wait4(cmd.Process.Pid, &status, syscall.WUNTRACED, nil); err != nil || !status.Stopped() {
		t.Fatalf("%v, %v", status, err)
	}
	return cmd.Process.Pid
}

// Whoever waits in vain is told for whom, and what to do.
func TestBusyNamesHolder(t *testing.T) {
	b := newBench(t)
	b.get(req("c", small))
	pid := stopped(t, "hold", b.o.Dir)
	b.o.LockTimeout = 20 * time.Millisecond
	_, err := Open(t.Context(), b.o)
	for _, want := range []string{fmt.Sprintf("process %d (", pid), "is stopped", fmt.Sprintf("kill -CONT %d", pid)} {
		if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %q", err, want)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	b.o.LockTimeout = time.Minute
	if _, err := Open(ctx, b.o); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), fmt.Sprintf("process %d (", pid)) {
		t.Errorf("%v does not name the process", err)
	}
}

// One that runs is named as well.
func TestHolderRuns(t *testing.T) {
	path := t.TempDir() + "/lock"
	if said := holderOf(path); !strings.Contains(said, "not known") {
		t.Errorf("without a file: %s", said)
	}
	lock, err := lockFile(t.Context(), path, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if said := holderOf(path); !strings.HasPrefix(said, fmt.Sprintf("process %d (", os.Getpid())) || !strings.Contains(said, "try again") {
		t.Error(said)
	}
}

// Nobody waits for one who reads, also if he was stopped in the middle of it, and he for
// nobody.
func TestSnapshotHoldsNothing(t *testing.T) {
	b := newBench(t)
	a := b.get(req("c", small))
	stopped(t, "snapshot", b.o.Dir)
	b.o.LockTimeout = 20 * time.Millisecond
	b.get(req("d", small))

	held, err := Open(t.Context(), b.o)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	s, err := TakeSnapshot(t.Context(), b.o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := held.Release(t.Context(), att("d")); err != nil {
		t.Fatal(err)
	}
	recs, err := s.List(t.Context())
	if err != nil || len(recs) != 2 {
		t.Errorf("%d records, %v", len(recs), err)
	}
	rec, found, err := s.Get(t.Context(), att("c"))
	if err != nil || !found {
		t.Fatal(found, err)
	}
	diff(t, "record", rec.Addrs, a.Addrs)
	st, err := s.Stats(t.Context(), conf.Mesos, small)
	if err != nil || st[0].Used != 2 {
		t.Errorf("%+v, %v", st, err)
	}
	if wrong, err := s.Verify(t.Context()); err != nil || len(wrong) > 0 {
		t.Error(wrong, err)
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	if _, err := s.List(t.Context()); err == nil {
		t.Error("a closed snapshot lists")
	}
}

// What a snapshot has is one state of the store, whoever writes meanwhile.
func TestSnapshotIsOneState(t *testing.T) {
	b := newBench(t)
	b.o.Now = nil
	b.get(req("other", prefixes("9.0.1.0/25")))
	var out strings.Builder
	cmd := command("churn", b.o.Dir, "w")
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	seen := map[int]int{}
	for range 2000 {
		s, err := TakeSnapshot(t.Context(), b.o)
		if err != nil {
			t.Error(err)
			break
		}
		recs, err := s.List(t.Context())
		wrong, verr := s.Verify(t.Context())
		if err := errors.Join(err, verr, s.Close()); err != nil || len(wrong) > 0 || len(recs) < 1 || len(recs) > 2 {
			t.Errorf("%d records, %v %v", len(recs), wrong, err)
			break
		}
		seen[len(recs)]++
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.Exited() {
		t.Errorf("the child ended by itself: %v\n%s", err, &out)
	}
	if seen[1] == 0 || seen[2] == 0 {
		t.Errorf("all alike: %v", seen)
	}
}

// A snapshot neither makes a store nor sets one aside, unless it is told how.
func TestSnapshotOfNone(t *testing.T) {
	b := newBench(t)
	if _, err := TakeSnapshot(t.Context(), b.o); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want fs.ErrNotExist", err)
	}
	if err := os.WriteFile(b.file(), make([]byte, 3*4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := TakeSnapshot(t.Context(), b.o); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v, want ErrDamaged", err)
	}
	madeAnew(t, b)
}

// madeAnew checks that a snapshot of a damaged store is one of what is attached, once it is
// told that.
func madeAnew(t *testing.T, b *bench) {
	t.Helper()
	b.o.Rebuild = func(context.Context) (Known, error) {
		return Known{Records: []Record{{Attachment: att("a"), Half: conf.Mesos, Addrs: addrs("9.0.1.2")}}}, nil
	}
	s, err := TakeSnapshot(t.Context(), b.o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, found, err := s.Get(t.Context(), att("a")); !found || err != nil || s.Repaired() == "" {
		t.Errorf("%v, %v, repaired: %q", found, err, s.Repaired())
	}
}

// A file may claim any length, and the memory for that is nobody's. Those who read and
// those who open say the same, and the one is made anew as any other that is damaged.
func TestHugeFileIsDamage(t *testing.T) {
	for name, size := range map[string]int64{"one byte more than a store may have": maxFileSize + 1, "1 TiB": 1 << 40} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.get(req("c", small))
			if err := os.Truncate(b.file(), size); err != nil {
				t.Skipf("the file system has no files of that size: %v", err)
			}
			if _, err := TakeSnapshot(t.Context(), b.o); !errors.Is(err, ErrDamaged) {
				t.Errorf("snapshot: got %v, want ErrDamaged", err)
			}
			if _, err := Open(t.Context(), b.o); !errors.Is(err, ErrDamaged) {
				t.Errorf("open: got %v, want ErrDamaged", err)
			}
			madeAnew(t, b)
		})
	}
}

// Whoever looks while a store is made anew finds one: it waits, or is told so. To find
// none means that nothing was ever attached.
func TestSnapshotDuringRebuild(t *testing.T) {
	b := newBench(t)
	if err := os.WriteFile(b.file(), make([]byte, 3*4096), 0o600); err != nil {
		t.Fatal(err)
	}
	reads := b.o
	reads.LockTimeout = 20 * time.Millisecond
	cannot := errors.New("no links today")
	b.o.Rebuild = func(context.Context) (Known, error) {
		if _, err := TakeSnapshot(t.Context(), reads); !errors.Is(err, ErrBusy) {
			t.Errorf("got %v, want ErrBusy", err)
		}
		return Known{}, cannot
	}
	for range 2 {
		if _, err := Open(t.Context(), b.o); !errors.Is(err, cannot) {
			t.Errorf("got %v, want %v", err, cannot)
		}
	}
	if _, err := TakeSnapshot(t.Context(), reads); !errors.Is(err, ErrDamaged) {
		t.Errorf("where it could not be made anew: got %v, want ErrDamaged", err)
	}
	if _, err := os.Lstat(b.file() + ".corrupt-1"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it was set aside although there is none in its place: %v", err)
	}
	if _, err := quarantine(b.file()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(b.file()); err != nil {
		t.Errorf("the name is gone before the new file has it: %v", err)
	}
}

// A store of an earlier boot is empty, and stays as it is until somebody opens it.
func TestSnapshotOfEarlierBoot(t *testing.T) {
	b := newBench(t)
	b.get(req("c", small))
	before, err := os.ReadFile(b.file())
	if err != nil {
		t.Fatal(err)
	}
	b.o.BootID = "boot-2"
	s, err := TakeSnapshot(t.Context(), b.o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	recs, err := s.List(t.Context())
	wrong, verr := s.Verify(t.Context())
	if len(recs) != 0 || len(wrong) > 0 || err != nil || verr != nil {
		t.Errorf("%v %v %v %v", recs, wrong, err, verr)
	}
	if after, err := os.ReadFile(b.file()); err != nil || string(after) != string(before) {
		t.Error("the file was written", err)
	}
}
