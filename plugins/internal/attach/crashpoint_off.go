//go:build !crashpoints

package attach

// crash marks a point at which tests kill the program. It does nothing here.
func crash(string) {}
