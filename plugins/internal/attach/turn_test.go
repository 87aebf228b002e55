package attach

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Who has something forgotten keeps others from ending, not from beginning; who
// stands still keeps nobody for long.
func TestTurn(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, lockFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a, b := openTurn(dir), openTurn(dir)
	defer a.close()
	defer b.close()
	a.begin()
	if !b.try(forgetting, unix.F_RDLCK) {
		t.Error("the second cannot begin beside the first")
	}
	if b.try(forgetting, unix.F_WRLCK) {
		t.Error("the second ends while the first has something forgotten")
	}
	b.end() // the first does not move: it is waited for, but not for ever
	a.end()
	if !b.try(forgetting, unix.F_WRLCK) {
		t.Error("the first has ended and keeps the lock")
	}
	a.begin() // the second stands still in its end
	a.end()
	none := openTurn(filepath.Join(dir, "none"))
	none.begin()
	none.end()
	none.close()
}
