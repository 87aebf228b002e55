package agent

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strings"

	"overlayd.internal/overlay/conf"
)

// instance tells this start of the agent from others, and this host from a copy
// of it; see api.RegisterRequest.
type instance struct {
	path     string
	own      string
	previous []string // newest first; the last one is what the coordinator knows
	known    bool     // the coordinator knows own
}

// newInstance begins another one. It is on disk before the coordinator hears of
// it, beside the one before, so that it does not matter when the agent is killed.
func (f *files) newInstance() (*instance, error) {
	i := &instance{path: filepath.Join(f.store.path, instanceFile), own: newID()}
	b, err := conf.ReadRegular(i.path, maxIDFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	i.previous = strings.Fields(string(b))
	if n := len(i.previous); n > 2 {
		i.previous = []string{i.previous[0], i.previous[n-1]}
	}
	return i, i.write()
}

func (i *instance) write() error {
	lines := []string{i.own}
	if n := len(i.previous); n > 0 && !i.known {
		lines = append(lines, i.previous[n-1])
	}
	return conf.WriteFile(i.path, []byte(strings.Join(lines, "\n")+"\n"), 0o600, "")
}

// accepted notes that the coordinator knows the instance.
func (i *instance) accepted() error {
	if i.known {
		return nil
	}
	i.known = true
	return i.write()
}
