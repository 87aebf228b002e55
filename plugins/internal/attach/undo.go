package attach

import "slices"

// undoStack takes back, in reverse, what was done so far. Each step is pushed
// right after the thing it takes back exists.
type undoStack []func() error

func (u *undoStack) push(f func() error) { *u = append(*u, f) }

// run takes everything back, once. It stops at the first step that fails,
// because what lies below may still be in use: the address of an interface that
// could not be removed must not be given to another.
func (u *undoStack) run() error {
	steps := *u
	*u = nil
	for _, f := range slices.Backward(steps) {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}
