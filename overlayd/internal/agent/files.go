package agent

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// The files of an agent besides those every program knows.
const (
	lockFile  = "agent.lock" // in both directories
	idFile    = "agent-id"   // in the state directory, as the others
	leaseFile = "lease.json"
	peersFile = "peers.json"

	instanceFile = "instance" // of this start, and until the coordinator knows it of those before
)

// How large they may be: 65,536 peers with ten overlays of both families take
// 60 MB.
const (
	maxIDFile = 4 << 10
	maxStored = 256 << 20
)

// files are the agent's two directories, locked against a second agent.
type files struct {
	run, store lockedDir
	log        *slog.Logger
}

// lockedDir is a directory that we hold the lock of.
type lockedDir struct {
	path string
	perm fs.FileMode
	lock *os.File
}

// openFiles makes and locks the directories and removes temporary files that a
// killed agent left.
func openFiles(runDir, stateDir string, log *slog.Logger) (*files, error) {
	f := &files{
		run:   lockedDir{path: runDir, perm: 0o755},   // the CNI programs and people read it
		store: lockedDir{path: stateDir, perm: 0o700}, // keys will lie there
		log:   log,
	}
	for _, d := range []*lockedDir{&f.run, &f.store} {
		if err := d.open(); err != nil {
			f.close()
			return nil, err
		}
	}
	for _, path := range []string{f.state(), f.lease(), f.peers(), f.id()} {
		f.removeTemporary(path)
	}
	return f, nil
}

// close gives the directories free.
func (f *files) close() {
	for _, d := range []*lockedDir{&f.run, &f.store} {
		if d.lock != nil {
			d.lock.Close()
		}
	}
}

func (f *files) state() string { return filepath.Join(f.run.path, conf.StateFile) }
func (f *files) id() string    { return filepath.Join(f.store.path, idFile) }
func (f *files) lease() string { return filepath.Join(f.store.path, leaseFile) }
func (f *files) peers() string { return filepath.Join(f.store.path, peersFile) }

// open makes the directory if it is not there, and locks it.
func (d *lockedDir) open() error {
	if err := makeDir(d.path, d.perm); err != nil {
		return err
	}
	lock, err := lockDir(d.path)
	if err != nil {
		return err
	}
	if d.lock != nil {
		d.lock.Close()
	}
	d.lock = lock
	return nil
}

// removed reports whether somebody removed the directory, or all that is in it.
func (d *lockedDir) removed() bool {
	ours, err := d.lock.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(d.lock.Name())
	return errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(ours, there)
}

// makeDir makes a directory with exactly these permissions, whatever the
// umask. One that is there stays as it is.
func makeDir(path string, perm fs.FileMode) error {
	fi, err := os.Stat(path)
	switch {
	case err == nil && fi.IsDir():
		return nil
	case err == nil:
		return fmt.Errorf("%s is not a directory; move it away", path)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if err := os.MkdirAll(path, perm); err != nil {
		return err
	}
	return os.Chmod(path, perm)
}

// lockDir keeps other agents out of a directory until the file is closed or
// the process ends.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockFile)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	if err := flock(f, lockPatience); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		owner := make([]byte, 32)
		n, _ := f.Read(owner)
		return nil, fmt.Errorf("another agent (process %s) uses %s; stop it, or give this one its own directories with --run-dir and --state-dir",
			strings.TrimSpace(string(owner[:n])), dir)
	}
	// Only people read the number; the lock is what counts.
	f.Truncate(0)
	fmt.Fprintf(f, "%d\n", os.Getpid())
	return f, nil
}

// lockPatience is how long a starting agent waits for the lock. An agent that
// was killed while it started a program leaves the lock to that program for the
// moment until it runs.
const lockPatience = 2 * time.Second

func flock(f *os.File, patience time.Duration) error {
	deadline := time.After(patience)
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-retry.C:
		case <-deadline:
			return err
		}
	}
}

// removeTemporary removes what an interrupted write of path left behind.
func (f *files) removeTemporary(path string) {
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".*.tmp"))
	for _, p := range left {
		if err := os.Remove(p); err == nil {
			f.log.Info("left over temporary file removed", logkey.Path, p)
		}
	}
}

// identity returns the agent id: the given one, else the stored one, else a new
// one, which is durable before anybody hears of it.
func (f *files) identity(given string) (string, error) {
	b, err := conf.ReadRegular(f.id(), maxIDFile)
	stored := strings.TrimSpace(string(b))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		id := given
		if id == "" {
			id = newID()
		}
		return id, conf.WriteFile(f.id(), []byte(id+"\n"), 0o600, "")
	case err != nil:
		return "", fmt.Errorf("read the agent id: %w", err)
	case given != "":
		if given != stored {
			f.log.Warn("the agent id given is not the stored one; the given one is used", logkey.To, given, logkey.From, stored, logkey.Path, f.id())
		}
		return given, nil
	case conf.CheckAgentID(stored) != nil:
		return "", fmt.Errorf("%s does not hold an agent id but %.80q; put the id back (overlayctl agents lists the ids by IP) or remove the file, and the host gets a new id and new subnets",
			f.id(), stored)
	}
	return stored, nil
}

// newID is 128 random bits in hex.
func newID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// savedLease is lease.json: the lease and when it was last renewed.
type savedLease struct {
	Lease   conf.Lease `json:"lease"`
	Renewed renewal    `json:"renewed"`
	// Left is leaseState.left.
	Left map[string][]netip.Prefix `json:"left,omitempty"`
	// Returned are blocks that must not be used again, whatever Lease says.
	Returned []returnedBlock `json:"returned,omitempty"`
}

// savedPeers is peers.json.
type savedPeers struct {
	AgentID   string      `json:"agent_id"`
	ClusterID string      `json:"cluster_id"`
	Revision  uint64      `json:"revision"`
	Run       string      `json:"run,omitempty"` // of the coordinator that told
	Fields    string      `json:"fields"`        // peerFields of who wrote it
	Peers     []conf.Peer `json:"peers"`
}

// peerFields are what this program knows of a peer. What another release did not know
// of those it stored, no coordinator tells again by itself.
func peerFields() string {
	var names []string
	for _, f := range reflect.VisibleFields(reflect.TypeFor[conf.Peer]()) {
		names = append(names, f.Name)
	}
	return strings.Join(names, " ")
}

// loadLease returns the stored lease of this agent, or false. A file that
// cannot be used is reported and fetched again from the coordinator.
func (f *files) loadLease(id string) (savedLease, bool) {
	var s savedLease
	if !f.load(f.lease(), &s) {
		return s, false
	}
	if err := checkLease(s.Lease, id); err != nil {
		f.log.Warn("the stored lease cannot be used; waiting for the coordinator", logkey.Path, f.lease(), logkey.Err, err)
		return s, false
	}
	return s, true
}

// loadPeers is loadLease for the peers; they must be of the given cluster. Those of
// another release are used until the coordinator has told all of them anew.
func (f *files) loadPeers(id, clusterID string) (savedPeers, bool) {
	var s savedPeers
	if !f.load(f.peers(), &s) {
		return s, false
	}
	if s.AgentID != id || s.ClusterID != clusterID {
		f.log.Warn("the stored peers are another agent's or cluster's; waiting for the coordinator", logkey.Path, f.peers())
		return s, false
	}
	for _, p := range s.Peers {
		if err := checkPeer(p); err != nil {
			f.log.Warn("the stored peers cannot be used; waiting for the coordinator", logkey.Path, f.peers(), logkey.Err, err)
			return s, false
		}
	}
	if s.Fields != peerFields() {
		s.Revision, s.Run = 0, ""
	}
	return s, true
}

func (f *files) load(path string, v any) bool {
	b, err := conf.ReadRegular(path, maxStored)
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.log.Warn("stored file cannot be read; waiting for the coordinator", logkey.Path, path, logkey.Err, err)
	}
	return err == nil
}

// checkLease says why a lease, from disk or from the coordinator, cannot be
// applied. Names become file and device names, so none is trusted.
func checkLease(l conf.Lease, id string) error {
	switch {
	case l.AgentID != id:
		return fmt.Errorf("lease of agent %q, not of %q", l.AgentID, id)
	case l.TermSeconds <= 0:
		return fmt.Errorf("lease with a term of %d s", l.TermSeconds)
	case !l.VTEP.IP.IsValid() && !l.VTEP.IP6.IsValid():
		return errors.New("lease without a VTEP address")
	case l.VTEP.IP.IsValid() && !l.VTEP.IP.Addr().Is4(), l.VTEP.IP6.IsValid() && !l.VTEP.IP6.Addr().Is6():
		return fmt.Errorf("lease with VTEP addresses %s and %s in the wrong places", l.VTEP.IP, l.VTEP.IP6)
	case l.VTEP.MAC == conf.MAC{} || l.VTEP.MAC[0]&1 != 0:
		return fmt.Errorf("lease with VTEP MAC %s", l.VTEP.MAC)
	}
	if err := conf.CheckAgentIP(l.AgentIP); err != nil {
		return fmt.Errorf("lease with agent IP: %w", err)
	}
	for _, g := range l.Grants {
		if err := conf.CheckName(g.Overlay.Name); err != nil {
			return fmt.Errorf("lease with overlay name: %w", err)
		}
		subnets := []netip.Prefix{g.Subnet, g.Subnet6}
		for _, b := range g.Blocks {
			subnets = append(subnets, b.Prefixes()...)
		}
		for _, s := range subnets {
			if s.IsValid() && (s != s.Masked() || s.Bits() > s.Addr().BitLen()-3) {
				return fmt.Errorf("lease of overlay %s with subnet %s", g.Overlay.Name, s)
			}
		}
	}
	return nil
}

// checkPeer says why a peer cannot be forwarded to.
func checkPeer(p conf.Peer) error {
	switch {
	case p.AgentID == "":
		return errors.New("peer without an agent id")
	case !p.AgentIP.IsValid():
		return fmt.Errorf("peer %s without an agent IP", p.AgentID)
	case !p.VTEPIP.IsValid() && !p.VTEPIP6.IsValid():
		return fmt.Errorf("peer %s without a VTEP address", p.AgentID)
	}
	for _, s := range p.Subnets {
		if !s.IsValid() || s != s.Masked() {
			return fmt.Errorf("peer %s with subnet %s", p.AgentID, s)
		}
	}
	return nil
}
