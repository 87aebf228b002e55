package agent

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// instance tells this start of the agent from others, and this host from a copy
// of it; see api.RegisterRequest.
type instance struct {
	path string
	own  string
	// previous are the starts since the last one that heard that the coordinator knows it,
	// and that one; newest first. The coordinator may know any of them.
	previous []string
	known    bool // the coordinator knows own
}

// newInstance begins another one. It is on disk before the coordinator hears of
// it, beside those before, so that it does not matter when the agent is killed.
func (f *files) newInstance() (*instance, error) {
	i := &instance{path: filepath.Join(f.store.path, instanceFile), own: newID()}
	b, err := conf.ReadRegular(i.path, maxIDFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	i.previous = strings.Fields(string(b))
	if n := len(i.previous); n > api.MaxPrevious {
		i.previous = append(i.previous[:api.MaxPrevious-1], i.previous[n-1])
	}
	return i, i.write()
}

func (i *instance) write() error {
	lines := []string{i.own}
	if !i.known {
		lines = append(lines, i.previous...)
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
