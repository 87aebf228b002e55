package netns

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
)

func TestRefGone(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	dir := t.TempDir()
	link := filepath.Join(dir, "ns") // a name that can be taken away
	cmd := exec.Command("unshare", "--net", "sh", "-c", "echo ready; read line")
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
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	own := filepath.Join("/proc", "self", "ns", "net")
	of := func(pid int) string { return filepath.Join("/proc", strconv.Itoa(pid), "ns", "net") }
	if err := os.Symlink(of(cmd.Process.Pid), link); err != nil {
		t.Fatal(err)
	}
	n := Look(link)
	if n.Inode == 0 || n == Look(own) || Look(own).Inode == n.Inode {
		t.Fatalf("looked up %+v", n)
	}
	gone := func(what string, n Ref, want bool) {
		t.Helper()
		if got := n.Gone(); got != want {
			t.Errorf("%s: gone is %v, want %v", what, got, want)
		}
	}
	gone("there", n, false)
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	gone("path gone", n, true)
	elsewhere := n
	elsewhere.Mount++
	gone("path gone for us, a process in it", elsewhere, false)
	process := n
	process.Path = "/proc/999999999/ns/net"
	gone("one process gone, another in it", process, false)
	stdin.Close()
	if err := cmd.Wait(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	gone("path and process gone", n, true)
	// The kernel may have given the number to another by now.
	elsewhere.Inode, process.Inode = 1, 1
	gone("path and process gone for us", elsewhere, true)
	gone("all processes gone", process, true)
	if err := os.Symlink(own, link); err != nil {
		t.Fatal(err)
	}
	gone("path of another", n, true)
	gone("never seen", Look("/nonexistent"), false)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	gone("a plain file", Look(file), false)
}
