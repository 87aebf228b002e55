package ipam

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// holderOf says who holds the lock at path, and what to do about it. A program holds it
// for a millisecond, unless it was stopped just then.
func holderOf(path string) string {
	pid := lockedBy(path)
	if pid == 0 {
		return "who holds it is not known; try again"
	}
	who := fmt.Sprintf("process %d holds it", pid)
	if program := programOf(pid); program != "" {
		who = fmt.Sprintf("process %d (%s) holds it", pid, program)
	}
	if stateOf(pid) == 'T' {
		return fmt.Sprintf("%s and is stopped; have it go on (kill -CONT %d) or end it (kill -KILL %d)", who, pid, pid)
	}
	return fmt.Sprintf("%s; try again, and if it is the same one then, thaw it if its cgroup is frozen, or end it (kill -KILL %d)", who, pid)
}

// lockedBy is the process that has a lock on the file at path; 0: none that we see.
func lockedBy(path string) (pid int) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return 0
	}
	text, err := os.ReadFile("/proc/locks")
	if err != nil {
		return 0
	}
	// 1: FLOCK  ADVISORY  WRITE 26923 00:1b:9980977 0 EOF; one that waits has "->".
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 5 && f[1] == "FLOCK" && f[5] == file {
			pid, _ = strconv.Atoi(f[4]) // of one in a namespace that we do not see there is none
			return max(pid, 0)
		}
	}
	return 0
}

// programOf is the program that a process runs, with its first argument where that is a
// word: overlayd is several programs.
func programOf(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
	args := strings.Split(strings.TrimRight(string(text), "\x00"), "\x00")
	name := args[0][strings.LastIndexByte(args[0], '/')+1:]
	if len(args) > 1 && !strings.HasPrefix(args[1], "-") {
		name += " " + args[1]
	}
	return strings.ToValidUTF8(name, "?")
}

// stateOf is the letter of proc(5) for what a process does; 0: it is gone.
func stateOf(pid int) byte {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, ok := strings.Cut(string(text), ") ")
	if err != nil || !ok || rest == "" {
		return 0
	}
	return rest[0]
}
