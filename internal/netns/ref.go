package netns

import (
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Ref is a container's network namespace as the runtime named it, and which
// one that was: a path may come to stand for another namespace.
type Ref struct {
	Path  string `json:"path"`
	Inode uint64 `json:"inode"` // 0: it was none, or could not be looked at
	Mount uint64 `json:"mount"` // of the mount namespace in which the path means that
}

// Look looks at the namespace without opening it.
func Look(path string) Ref {
	return Ref{Path: path, Inode: inode(path), Mount: inode(ownMounts)}
}

const ownMounts = "/proc/self/ns/mnt"

// inode is the number of the namespace at path, 0 if there is none.
func inode(path string) uint64 {
	var fs unix.Statfs_t
	var st unix.Stat_t
	if unix.Statfs(path, &fs) != nil || fs.Type != unix.NSFS_MAGIC || unix.Stat(path, &st) != nil {
		return 0
	}
	return st.Ino
}

// Gone reports whether the namespace is no longer. Where that cannot be told, it
// is not gone.
func (n Ref) Gone() bool {
	if n.Inode == 0 || inode(n.Path) == n.Inode {
		return false
	}
	if !strings.HasPrefix(n.Path, "/proc/") && n.Mount == inode(ownMounts) {
		return true // the runtime took the path away, or gave it to another
	}
	// The process that the path named has ended, or we see other mounts than the
	// runtime. Then it lasts as long as a process is in it; the kernel soon uses
	// its number for another, which takes the proof of its end away, and no
	// address is lost to the wrong one.
	processes, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil || len(processes) == 0 {
		return false
	}
	for _, p := range processes {
		if p == "/proc/1/ns/net" {
			continue // init is nobody's container, and may be out of reach
		}
		var st unix.Stat_t
		switch err := unix.Stat(p, &st); {
		case err == nil && st.Ino == n.Inode:
			return false
		case err != nil && err != unix.ENOENT && err != unix.ESRCH:
			return false // that of somebody we may not look at
		}
	}
	return true
}
