package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// With dieEnv set the test binary is the victim of TestKilledLabIsRemoved.
const dieEnv = "OVERLAY_LAB_VICTIM"

func TestMain(m *testing.M) {
	if os.Getenv(dieEnv) != "" {
		victim()
	}
	os.Exit(m.Run())
}

// victim makes a lab with a process in it, says so and waits to be killed.
func victim() {
	ctx := context.Background()
	l, err := New(ctx, Options{})
	if err == nil {
		_, err = l.Start(l.LAN, "sleeper", "sleep", "1000")
	}
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	fmt.Println(l.Name)
	select {}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

// traces are what is left of a lab on the machine.
func traces(name string) []string {
	ns, _ := filepath.Glob(filepath.Join(netnsDir, name+"-*"))
	dirs, _ := filepath.Glob(dirOf(name))
	return append(ns, dirs...)
}

func TestLab(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	l, err := New(ctx, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var nodes []*Node
	for i, name := range []string{"a", "b"} {
		n, err := l.Node(ctx, name, byte(2+i))
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Serve(ctx, n.Netns); err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, n)
	}
	a, b := nodes[0], nodes[1]
	var pairs []Pair
	for _, addr := range [][2]netip.Addr{{a.IP, b.IP}, {a.IP6, b.IP6}} {
		pairs = append(pairs, Pair{From: Endpoint{NS: a.Netns}, To: Endpoint{NS: b.Netns, Addr: addr[1]}, Seen: addr[0]})
	}
	for _, r := range CheckPairs(ctx, pairs) {
		if r.Err != nil || r.RTT <= 0 {
			t.Errorf("%s, round trip %v", r, r.RTT)
		}
	}

	// A wrong expectation and an address nobody has are told apart from success.
	pairs[0].Seen = b.IP
	pairs[1].To.Addr = netip.MustParseAddr("fd00:172:17::99")
	for _, r := range CheckPairs(ctx, pairs) {
		if r.Err == nil {
			t.Errorf("%s, want an error", r)
		}
	}

	if out, err := a.Run(ctx, "sh", "-c", "echo said; echo complained >&2"); out != "said\n" || err != nil {
		t.Errorf("output %q, %v", out, err)
	}
	if out, err := a.Run(ctx, "sh", "-c", "echo said; echo complained >&2; exit 3"); out != "said\n" || err == nil || !strings.Contains(err.Error(), "complained") {
		t.Errorf("output %q, %v", out, err)
	}

	p, err := l.Start(a.Netns, "sleeper", "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	if p.Fate() != "running" {
		t.Errorf("fate = %q", p.Fate())
	}
	p.Kill()
	if p.Fate() != "signal: killed" {
		t.Errorf("fate = %q", p.Fate())
	}
	p, err = l.Start(a.Netns, "sleeper", "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-p.Exited():
	case <-time.After(5 * time.Second):
		t.Error("Close has left a process")
	}
	if left := traces(l.Name); len(left) > 0 {
		t.Errorf("Close has left %q", left)
	}
}

func TestKilledLabIsRemoved(t *testing.T) {
	needRoot(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), dieEnv+"=1")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	name := strings.TrimSpace(line)
	if err != nil || !labName.MatchString(name) {
		t.Fatalf("the victim says %q, %v", line, err)
	}
	if len(traces(name)) == 0 {
		t.Fatalf("the victim %s has made nothing", name)
	}
	cmd.Process.Kill()
	cmd.Wait()
	err = Wait(t.Context(), "the lab to be removed", 10*time.Second, func() error {
		if left := traces(name); len(left) > 0 {
			return fmt.Errorf("%q is still there", left)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestSweep(t *testing.T) {
	needRoot(t)
	ctx := t.Context()
	make := func(keep bool) string {
		gone := exec.Command("true")
		if err := gone.Run(); err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprintf("ovl%d", gone.Process.Pid)
		t.Cleanup(func() { Remove(context.Background(), name) })
		if err := run(exec.Command("ip", "netns", "add", name+"-x")); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(dirOf(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if keep {
			if err := os.WriteFile(filepath.Join(dirOf(name), keepFile), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		return name
	}
	dead, kept := make(false), make(true)
	for range 2 {
		if err := Sweep(ctx); err != nil {
			t.Fatal(err)
		}
		if left := traces(dead); len(left) > 0 {
			t.Errorf("Sweep has left %q", left)
		}
		if len(traces(kept)) != 2 {
			t.Errorf("Sweep has removed a lab that was to be kept")
		}
	}
	names, err := Kept()
	if err != nil || !slices.Contains(names, kept) {
		t.Errorf("Kept() = %q, %v", names, err)
	}
	if err := Remove(ctx, kept); err != nil {
		t.Error(err)
	}
	if left := traces(kept); len(left) > 0 {
		t.Errorf("Remove has left %q", left)
	}
}

func TestStop(t *testing.T) {
	needRoot(t)
	l, err := New(t.Context(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	// The shells say when their trap is set.
	for script, ok := range map[string]bool{
		`trap 'exit 0' TERM; echo set; sleep 1000 & wait`: true,
		`trap 'exit 3' TERM; echo set; sleep 1000 & wait`: false,
	} {
		p, err := l.Start(l.LAN, "sh", "bash", "-c", script)
		if err != nil {
			t.Fatal(err)
		}
		if err := Wait(t.Context(), "the trap", 5*time.Second, func() error { return p.LogContains("set") }); err != nil {
			t.Fatal(err)
		}
		if err := p.Stop(); (err == nil) != ok {
			t.Errorf("%s: %v", script, err)
		}
		os.Remove(p.Log)
	}
}

func TestWait(t *testing.T) {
	cause := errors.New("not yet")
	n := 0
	err := Wait(t.Context(), "three", 5*time.Second, func() error {
		if n++; n < 3 {
			return cause
		}
		return nil
	})
	if err != nil || n != 3 {
		t.Errorf("n = %d, err = %v", n, err)
	}
	err = Wait(t.Context(), "never", 30*time.Millisecond, func() error { return cause })
	if !errors.Is(err, cause) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("err = %v", err)
	}
}
