package coordinator

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
)

// WitnessFile is a Witness in a file of one line. It is written in place and not
// synced with every change: it is about a store that somebody puts back, not about
// power cuts, after which it may be behind the store and never ahead of what the
// store had.
type WitnessFile struct {
	log *slog.Logger

	mu      sync.Mutex
	file    *os.File
	cluster string
	epoch   uint64
	failing bool
}

// maxWitness bounds the file, in bytes.
const maxWitness = 256

// OpenWitness opens the file, or makes it.
func OpenWitness(path string, log *slog.Logger) (*WitnessFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	w := &WitnessFile{log: log, file: f}
	line, err := io.ReadAll(io.LimitReader(f, maxWitness))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", path, err), f.Close())
	}
	// One that was cut short knows nothing; what it says comes back soon.
	if fields := strings.Fields(string(line)); len(fields) == 2 {
		if epoch, err := strconv.ParseUint(fields[1], 10, 64); err == nil && epoch <= maxEpoch {
			w.cluster, w.epoch = fields[0], epoch
		}
	}
	return w, nil
}

// Highest is the highest epoch that the store of a cluster had.
func (w *WitnessFile) Highest(cluster string) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if cluster != w.cluster {
		return 0
	}
	return w.epoch
}

// Note is told of an epoch in the store of a cluster.
func (w *WitnessFile) Note(cluster string, epoch uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if cluster == w.cluster && epoch <= w.epoch {
		return
	}
	w.cluster, w.epoch = cluster, epoch
	_, err := w.file.WriteAt(fmt.Appendf(nil, "%s %020d\n", cluster, epoch), 0)
	if (err != nil) != w.failing {
		w.failing = err != nil
		if err != nil {
			w.log.Warn("cannot write how far the store is; a store that is put back is only noticed when agents register", "path", w.file.Name(), "err", err)
		}
	}
}

// Close writes the file to the disk.
func (w *WitnessFile) Close() error {
	return errors.Join(w.file.Sync(), w.file.Close())
}
