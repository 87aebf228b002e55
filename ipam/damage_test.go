package ipam

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/boltfile"
)

// The layout of a bbolt file, for those who damage one.
const (
	pageSize    = boltfile.PageSize
	pageHeader  = 16
	elementSize = 16
	flagLeaf    = 0x02
)

var native = binary.NativeEndian

func findTicket(s *Store, a netip.Addr) (t ticket, ok bool, err error) {
	err = s.db.view(func(tx *bolt.Tx) error {
		h, err := s.half(tx, conf.Mesos)
		if err != nil {
			return err
		}
		t, ok, err = h.ticketOf(a)
		return err
	})
	return t, ok, err
}

// occupied makes a store of a /26 half with 40 addresses in use and a few
// cooling, and returns its file and what is in use.
func occupied(t *testing.T, n int, ranges []netip.Prefix) ([]byte, []Record) {
	b := newBench(t)
	s, err := Open(t.Context(), b.o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range n {
		r := req(fmt.Sprint("c", i), ranges)
		r.NetNS.Path = "/run/netns/c" // of a plugin without a bridge, which would have no room for them
		if _, err := s.Allocate(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	for i := 0; i < n; i += 8 {
		if _, err := s.Release(t.Context(), att(fmt.Sprint("c", i))); err != nil {
			t.Fatal(err)
		}
	}
	recs, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	verify(t, s)
	file, err := os.ReadFile(b.file())
	if err != nil {
		t.Fatal(err)
	}
	return file, recs
}

// Whatever is in the file's place: it is set aside, the truth is asked for, and
// no address is given out twice. Without the truth it is refused.
func TestForeignFiles(t *testing.T) {
	truth := func(context.Context) (Known, error) {
		return Known{Records: []Record{{Attachment: att("old"), Half: conf.Mesos, Addrs: addrs("9.0.1.2")}}}, nil
	}
	for name, place := range map[string]func(path string) error{
		"empty":         func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"text":          func(p string) error { return os.WriteFile(p, []byte("hello"), 0o600) },
		"page of zeros": func(p string) error { return os.WriteFile(p, make([]byte, 16*pageSize), 0o600) },
		"directory":     func(p string) error { return os.Mkdir(p, 0o700) },
		"full directory": func(p string) error {
			return errors.Join(os.Mkdir(p, 0o700), os.WriteFile(filepath.Join(p, "x"), nil, 0o600))
		},
		"symlink":    func(p string) error { return os.Symlink("/etc/passwd", p) },
		"fifo":       func(p string) error { return unix.Mkfifo(p, 0o600) },
		"other bolt": otherBolt,
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			if err := place(b.file()); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(t.Context(), b.o); !errors.Is(err, ErrDamaged) {
				t.Fatalf("got %v, want ErrDamaged", err)
			}
			b.o.Rebuild = truth
			b.with(func(s *Store) {
				if !strings.Contains(s.Repaired(), "dcos.db.corrupt-1") {
					t.Errorf("repaired: %q", s.Repaired())
				}
				a, err := s.Allocate(t.Context(), req("new", small))
				if err != nil {
					t.Fatal(err)
				}
				diff(t, "next", a.Addrs, addrs("9.0.1.3"))
			})
			if _, err := os.Lstat(b.file() + ".corrupt-1"); err != nil {
				t.Error(err)
			}
		})
	}
}

func otherBolt(path string) error {
	db, err := bolt.Open(path, 0o600, &bolt.Options{PageSize: pageSize})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucket([]byte("v1"))
		return err
	})
	return errors.Join(err, db.Close())
}

// What was cooling in a damaged file is not known, also where nothing is in use.
func TestDamageWithNothingInUse(t *testing.T) {
	b := newBench(t)
	b.o.Rebuild = func(context.Context) (Known, error) { return Known{}, nil }
	diff(t, "first", b.get(req("a", small)), Allocation{Addrs: addrs("9.0.1.2")})
	b.release("a")
	if err := os.Truncate(b.file(), pageSize); err != nil {
		t.Fatal(err)
	}
	diff(t, "before it cooled", b.get(req("b", small)), Allocation{Addrs: addrs("9.0.1.2"), Flush: addrs("9.0.1.2")})
	b.now += cooling
	diff(t, "later", b.get(req("c", small)), Allocation{Addrs: addrs("9.0.1.3")})
}

// Whatever the directory is called.
func TestThreeDamagedFilesAreKept(t *testing.T) {
	b := newBench(t)
	b.o.Dir = filepath.Join(b.o.Dir, "run [*")
	if err := os.Mkdir(b.o.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	b.o.Rebuild = func(context.Context) (Known, error) { return Known{}, nil }
	for range 5 {
		if err := os.WriteFile(b.file(), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		b.with(func(*Store) {})
	}
	entries, err := os.ReadDir(b.o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	diff(t, "kept", names, []string{"dcos.db", "dcos.db.corrupt-3", "dcos.db.corrupt-4", "dcos.db.corrupt-5", "dcos.lock"})
}

func TestNewerFormatIsRefusedAndKept(t *testing.T) {
	b := newBench(t)
	b.get(req("c", small))
	db, err := bolt.Open(b.file(), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	key := []byte{kindBoot}
	err = db.Update(func(tx *bolt.Tx) error {
		v := []byte{formatVersion + 1, 'x'}
		sum := newSealer(bucketStore).checksum(key, v)
		v = append(v, byte(sum>>24), byte(sum>>16), byte(sum>>8), byte(sum))
		return tx.Bucket([]byte(bucketStore)).Put(key, v)
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	b.o.Rebuild = func(context.Context) (Known, error) { t.Error("rebuilt"); return Known{}, nil }
	if _, err := Open(t.Context(), b.o); err == nil || errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "use the newer program") {
		t.Errorf("got %v", err)
	}
}

// The last commit is in the newer meta page. Should that be lost, bbolt would go
// back to the one before, and hand the last address out again.
func TestLostCommitIsNoticed(t *testing.T) {
	b := newBench(t)
	b.get(req("a", small))
	b.get(req("b", small))
	for page := range 2 {
		file, err := os.ReadFile(b.file())
		if err != nil {
			t.Fatal(err)
		}
		file[page*pageSize+pageHeader+50] ^= 1
		c := newBench(t)
		if err := os.WriteFile(c.file(), file, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), c.o); !errors.Is(err, ErrDamaged) {
			t.Errorf("meta page %d: %v", page, err)
		}
	}
}

// A page that claims to be millions of pages long is freed as such, and then the
// list of free pages does not fit: TestMutations finds one now and then. That is
// no lack of room, which would pass.
func TestOutgrownFileIsDamage(t *testing.T) {
	b := newBench(t)
	b.with(func(s *Store) {
		err := s.db.update(func(*bolt.Tx) error { return bolterrors.ErrMaxSizeReached })
		if !errors.Is(err, ErrDamaged) {
			t.Errorf("got %v, want it to be damage", err)
		}
	})
}

// A page whose header counts one element less is sound in itself, and so is the
// rest of a large file. The address that nothing leads to any more is not free.
func TestHiddenAddressIsNotGivenOut(t *testing.T) {
	ranges := prefixes("9.0.0.0/16")
	file, recs := occupied(t, 3000, ranges)
	truth := func(context.Context) (Known, error) { return Known{Records: recs}, nil }
	owner := map[netip.Addr]string{}
	for _, r := range recs {
		owner[r.Addrs[0]] = r.ContainerID
	}
	hidden := 0
	for p := 2; p < len(file)/pageSize; p++ {
		page := file[p*pageSize : (p+1)*pageSize]
		count := native.Uint16(page[10:])
		if native.Uint16(page[8:]) != flagLeaf || count == 0 {
			continue
		}
		e := page[pageHeader+(int(count)-1)*elementSize:]
		pos, size := native.Uint32(e[4:]), native.Uint32(e[8:])
		if size != 17 || e[pos] != kindInUse {
			continue
		}
		a, err := keyAddr(e[pos : pos+size])
		if err != nil || owner[a] == "" {
			continue // of a page that is free, with content of earlier
		}
		damaged := slices.Clone(file)
		native.PutUint16(damaged[p*pageSize+10:], count-1)
		b := newBench(t)
		if err := os.WriteFile(b.file(), damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		r := req("thief", ranges)
		r.Want = []netip.Addr{a}
		allocate := func() error {
			s, err := Open(t.Context(), b.o)
			if err != nil {
				return err
			}
			defer s.Close()
			_, err = s.Allocate(t.Context(), r)
			return err
		}
		var un *UnavailableError
		switch err := allocate(); {
		case errors.As(err, &un):
			continue // of a page that is free: the real one has it
		case !errors.Is(err, ErrDamaged):
			t.Fatalf("page %d: %s of %s asked for by name: %v, want ErrDamaged", p, a, owner[a], err)
		}
		hidden++
		b.o.Rebuild = truth
		if err := allocate(); !errors.As(err, &un) {
			t.Fatalf("page %d: %s of %s after the repair: %v, want that it is in use", p, a, owner[a], err)
		}
		if hidden == 10 {
			break
		}
	}
	if hidden < 10 {
		t.Errorf("only %d pages were tried", hidden)
	}
}

// Mutations: flipped bits, cut-off ends, zeroed and swapped pages. The store must
// refuse the file or use it, and in no case may it crash or give out an address
// that is in use. A crash would take the process, so children do it.
func TestMutations(t *testing.T) {
	n := 1500
	if testing.Short() {
		n = 150
	}
	t.Run("small", func(t *testing.T) { mutations(t, n, 40, prefixes("9.0.1.0/26")) })
	// Just too many pages to be walked at every opening, and far too many.
	t.Run("medium", func(t *testing.T) { mutations(t, n/3, 400, prefixes("9.0.0.0/22")) })
	t.Run("large", func(t *testing.T) { mutations(t, n/10, 6000, prefixes("9.0.0.0/16")) })
}

func mutations(t *testing.T, n, used int, ranges []netip.Prefix) {
	file, recs := occupied(t, used, ranges)
	dir := tempDir(t)
	if err := os.WriteFile(filepath.Join(dir, "original"), file, 0o600); err != nil {
		t.Fatal(err)
	}
	var owners strings.Builder
	for _, r := range recs {
		fmt.Fprintln(&owners, r.ContainerID, r.Addrs[0])
	}
	if err := os.WriteFile(filepath.Join(dir, "truth"), []byte(owners.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	out := child(t, "mutate", dir, fmt.Sprint(n), ranges[0].String())
	t.Logf("%s", out)
	if !strings.Contains(out, "damage noticed") {
		t.Error("the child did not finish")
	}
}

func childMutate() int {
	dir := os.Args[1]
	n, _ := strconv.Atoi(os.Args[2])
	ranges := prefixes(os.Args[3])
	original, err := os.ReadFile(filepath.Join(dir, "original"))
	if err != nil {
		return complain("%v", err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "truth"))
	if err != nil {
		return complain("%v", err)
	}
	var truth []Record
	inUse := map[netip.Addr]bool{}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		a := netip.MustParseAddr(f[1])
		truth = append(truth, Record{Attachment: att(f[0]), Half: conf.Mesos, Addrs: []netip.Addr{a}})
		inUse[a] = true
	}
	noticed := 0
	for i := range n {
		rng := rand.New(rand.NewPCG(uint64(i), 7))
		file, what := mutate(rng, slices.Clone(original))
		for _, rebuild := range []bool{false, true} {
			o := Options{Dir: filepath.Join(dir, "ipam"), Overlay: "dcos", BootID: "boot-1", Cooling: cooling, Now: func() time.Duration { return 2 * time.Hour }}
			if rebuild {
				o.Rebuild = func(context.Context) (Known, error) { return Known{Records: truth}, nil }
			}
			if err := os.RemoveAll(o.Dir); err != nil {
				return complain("%v", err)
			}
			if err := os.Mkdir(o.Dir, 0o700); err != nil {
				return complain("%v", err)
			}
			if err := os.WriteFile(filepath.Join(o.Dir, "dcos.db"), file, 0o600); err != nil {
				return complain("%v", err)
			}
			damaged, err := useMutated(o, ranges, inUse)
			if err != nil {
				return complain("mutation %d (%s), rebuild %v: %v", i, what, rebuild, err)
			}
			if damaged {
				noticed++
			}
		}
	}
	fmt.Printf("%d mutations, %d times damage noticed\n", n, noticed)
	return 0
}

// useMutated does what the programs do, an opening for each operation. Those who
// are running ask for their address again, new ones come, and all is released.
func useMutated(o Options, ranges []netip.Prefix, inUse map[netip.Addr]bool) (damaged bool, err error) {
	ctx := context.Background()
	for i := range 30 {
		s, err := Open(ctx, o)
		if errors.Is(err, ErrDamaged) && o.Rebuild == nil {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		damaged = damaged || s.Repaired() != ""
		r := req(fmt.Sprint("new", i), ranges)
		r.NetNS.Path = "/run/netns/new" // takes no port, of which the large stores have none left
		if i%5 == 4 {                   // one that is in use, by name
			for a := range inUse {
				r.Want = []netip.Addr{a}
				break
			}
		}
		got, err := s.Allocate(ctx, r)
		damaged = damaged || s.Repaired() != ""
		if cerr := s.Close(); cerr != nil {
			return false, cerr
		}
		var un *UnavailableError
		var ex *ExhaustedError
		switch {
		case errors.Is(err, ErrDamaged) && o.Rebuild == nil:
			return true, nil
		case err == nil && inUse[got.Addrs[0]]:
			return false, fmt.Errorf("%s was given to %s and is in use", got.Addrs[0], r.ContainerID)
		case err == nil, errors.As(err, &un), errors.As(err, &ex):
		default:
			return false, err
		}
	}
	return damaged, nil
}

func mutate(rng *rand.Rand, b []byte) ([]byte, string) {
	pages := len(b) / pageSize
	used := 0 // pages with something in them
	for p := range pages {
		if slices.ContainsFunc(b[p*pageSize:(p+1)*pageSize], func(c byte) bool { return c != 0 }) {
			used = p + 1
		}
	}
	page := func() []byte { p := rng.IntN(used); return b[p*pageSize : (p+1)*pageSize] }
	switch kind := rng.IntN(10); kind {
	case 0:
		n := rng.IntN(len(b))
		return b[:n], fmt.Sprintf("cut off at %d", n)
	case 1:
		n := rng.IntN(pages)
		return b[:n*pageSize], fmt.Sprintf("cut off at page %d", n)
	case 2:
		clear(page())
		return b, "page of zeros"
	case 3:
		copy(page(), page())
		return b, "page copied over another"
	case 4:
		p := page()
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		return b, "page of noise"
	case 5, 6: // where it hurts: header and elements
		p := page()
		at := rng.IntN(64)
		p[at] ^= 1 << rng.IntN(8)
		return b, fmt.Sprintf("bit in a page header, byte %d", at)
	default:
		n := 1 + rng.IntN(3)
		for range n {
			p := page()
			p[rng.IntN(len(p))] ^= 1 << rng.IntN(8)
		}
		return b, fmt.Sprintf("%d bits", n)
	}
}

// A full file system: ADD fails cleanly, nothing is lost, DEL works.
func TestFullDisk(t *testing.T) {
	b := newBench(t)
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a tmpfs")
	}
	if err := unix.Mount("tmpfs", b.o.Dir, "tmpfs", 0, "size=400k"); err != nil {
		t.Skipf("mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(b.o.Dir, 0); err != nil {
			t.Error(err)
		}
	})
	ranges := prefixes("fd01:b::/64")
	b.get(req("c0", ranges))
	var ballast int
	for i := range 200 { // fill up
		if err := os.WriteFile(filepath.Join(b.o.Dir, fmt.Sprint("ballast", i)), make([]byte, 4096), 0o600); err != nil {
			ballast = i
			break
		}
	}
	n := 1
	for ; ; n++ {
		if _, err := b.allocate(req(fmt.Sprint("c", n), ranges)); err != nil {
			if !errors.Is(err, unix.ENOSPC) && !strings.Contains(err.Error(), unix.ENOSPC.Error()) {
				t.Fatalf("attachment %d: %v", n, err)
			}
			break
		}
	}
	if n < 20 {
		t.Errorf("full after %d attachments, what was allocated at first should be enough for more", n)
	}
	for i := range n {
		diff(t, "released", len(b.release(fmt.Sprint("c", i))), 1)
	}
	for i := range ballast + 1 {
		if err := os.Remove(filepath.Join(b.o.Dir, fmt.Sprint("ballast", i))); err != nil {
			t.Fatal(err)
		}
	}
	b.get(req("after", ranges))
	t.Logf("full after %d attachments", n)
}

// A store that cannot be written is an error, and nothing changes.
func TestReadOnlyFileSystem(t *testing.T) {
	b := newBench(t)
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a tmpfs")
	}
	if err := unix.Mount("tmpfs", b.o.Dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(b.o.Dir, 0); err != nil {
			t.Error(err)
		}
	})
	b.get(req("a", small))
	remount := func(flags uintptr) {
		t.Helper()
		if err := unix.Mount("tmpfs", b.o.Dir, "tmpfs", unix.MS_REMOUNT|flags, "size=1m"); err != nil {
			t.Fatal(err)
		}
	}
	remount(unix.MS_RDONLY)
	if _, err := Open(t.Context(), b.o); !errors.Is(err, unix.EROFS) {
		t.Errorf("got %v, want EROFS", err)
	}
	remount(0)
	diff(t, "as before", b.get(req("a", small)), Allocation{Addrs: addrs("9.0.1.2"), Existing: true})
}

// Some file systems do not say how large they are: a ramfs, a tmpfs without limits.
func TestCheckRoom(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a tmpfs")
	}
	for options, want := range map[string]error{"size=0,nr_inodes=0": nil, "size=1m": nil, "size=64k": unix.ENOSPC} {
		t.Run(options, func(t *testing.T) {
			dir := t.TempDir()
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
				t.Skipf("mount a tmpfs: %v", err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
			})
			if err := CheckRoom(filepath.Join(dir, "ipam")); !errors.Is(err, want) {
				t.Errorf("got %v, want %v", err, want)
			}
		})
	}
}
