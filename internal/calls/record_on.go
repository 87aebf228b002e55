//go:build !nocalls

package calls

import "golang.org/x/sys/unix"

// Record counts the call in the run directory and, unless it is a STATUS that was
// successful, which runtimes ask for every few seconds, logs it.
func Record(dir string, c Call) {
	c.count(dir)
	if c.Verb == "STATUS" && c.Code == 0 {
		return
	}
	fd := openLog(dir, c.create())
	if fd < 0 {
		return
	}
	defer unix.Close(fd)
	_, _ = unix.Write(fd, c.line()) // in one piece: others write too
}
