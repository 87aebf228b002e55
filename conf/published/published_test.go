package published

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
)

// sound is a state that addresses may be given out from.
func sound(t *testing.T) conf.State {
	t.Helper()
	boot, err := conf.BootID()
	if err != nil {
		t.Fatal(err)
	}
	lease := conf.Lease{Bridges: conf.Halves[:], Grants: []conf.Grant{
		{Overlay: conf.Overlay{Name: "dcos", Subnet: netip.MustParsePrefix("9.0.0.0/8"), Prefix: 24}, Subnet: netip.MustParsePrefix("9.0.1.0/24")},
		{
			Overlay: conf.Overlay{Name: "six", Subnet6: netip.MustParsePrefix("fd01::/64"), Prefix6: 80},
			Subnet6: netip.MustParsePrefix("fd01::1:0:0:0/80"),
		},
	}}
	return conf.State{
		BootID: boot, MTU: 1450, CoolingSeconds: 150,
		Lease:    conf.LeaseState{ExpiresBoottime: int64(conf.Boottime() + time.Hour)},
		Overlays: lease.AgentOverlays(nil),
	}
}

func write(t *testing.T, s conf.State) (dir string) {
	t.Helper()
	dir = t.TempDir()
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, conf.StateFile), b, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func get(dir, overlay string, half conf.Half) error {
	s, err := Load(dir)
	if err == nil {
		_, _, err = Overlay(s, overlay, half)
	}
	return err
}

func TestSound(t *testing.T) {
	s := sound(t)
	for _, o := range s.Overlays {
		for _, half := range conf.Halves {
			if err := get(write(t, s), o.Info.Name, half); err != nil {
				t.Errorf("%s %s: %v", o.Info.Name, half, err)
			}
		}
	}
	if problem := Contradiction(s); problem != "" {
		t.Error(problem)
	}
}

func TestRefusals(t *testing.T) {
	p := netip.MustParsePrefix
	for name, tt := range map[string]struct {
		change func(*conf.State)
		reason Reason
		words  string
	}{
		"other boot":             {func(s *conf.State) { s.BootID = "x" }, Pending, "before the last reboot"},
		"run out":                {func(s *conf.State) { s.Lease.ExpiresBoottime = 1 }, Expired, "run out"},
		"lost":                   {func(s *conf.State) { s.Lease.Lost = "given to b" }, Lost, "given to b"},
		"no overlay":             {func(s *conf.State) { s.Overlays = nil }, NoOverlay, "not known on this host"},
		"no bridge":              {func(s *conf.State) { s.Overlays[0].MesosBridge = nil }, NoOverlay, "other --bridges"},
		"no subnet":              {func(s *conf.State) { s.Overlays[0] = conf.AgentOverlay{Info: s.Overlays[0].Info} }, Pending, "no subnet on this host yet"},
		"drained":                {func(s *conf.State) { s.Overlays[0].Info.Draining = true }, Draining, "overlayctl overlays undrain dcos"},
		"negative MTU":           {func(s *conf.State) { s.MTU = -1 }, Invalid, "mtu is -1"},
		"no MTU":                 {func(s *conf.State) { s.MTU = 0 }, Invalid, "mtu is 0"},
		"MTU of no device":       {func(s *conf.State) { s.MTU = 65536 }, Invalid, "mtu is 65536"},
		"negative cooling":       {func(s *conf.State) { s.CoolingSeconds = -1 }, Invalid, "cooling_seconds is -1"},
		"half elsewhere":         {func(s *conf.State) { s.Overlays[0].MesosBridge.IP = p("9.0.2.0/25") }, Invalid, "9.0.2.0/25, is not in the subnet of this host, 9.0.1.0/24"},
		"other half elsewhere":   {func(s *conf.State) { s.Overlays[0].DockerBridge.IP = p("9.0.2.0/25") }, Invalid, "the docker half, 9.0.2.0/25"},
		"half too large":         {func(s *conf.State) { s.Overlays[0].MesosBridge.IP = p("9.0.0.0/16") }, Invalid, "is not in the subnet of this host"},
		"half too small":         {func(s *conf.State) { s.Overlays[0].MesosBridge.IP = p("9.0.1.0/31") }, Invalid, "no address for a container"},
		"half of other family":   {func(s *conf.State) { s.Overlays[0].MesosBridge.IP6 = p("fd01::/64") }, Invalid, "fd01::/64, is not in the subnet of this host"},
		"subnet elsewhere":       {func(s *conf.State) { s.Overlays[0].Info.Subnet = p("10.0.0.0/8") }, Invalid, "is not in the overlay's, 10.0.0.0/8"},
		"bridge of another name": {func(s *conf.State) { s.Overlays[0].MesosBridge.Name = "docker0" }, Invalid, `"docker0", want m-dcos`},
		"overlay twice":          {func(s *conf.State) { s.Overlays = append(s.Overlays, s.Overlays[0]) }, Invalid, "dcos is there twice"},
		"subnet twice": {func(s *conf.State) {
			other := s.Overlays[0]
			other.Info.Name, other.MesosBridge, other.DockerBridge = "b", nil, nil
			s.Overlays = append(s.Overlays, other)
		}, Invalid, "dcos and b have the subnets"},
	} {
		t.Run(name, func(t *testing.T) {
			s := sound(t)
			tt.change(&s)
			err := get(write(t, s), "dcos", conf.Mesos)
			var e *Error
			if !errors.As(err, &e) || e.Reason != tt.reason || !strings.Contains(err.Error(), tt.words) {
				t.Errorf("got %v, want reason %d and %q", err, tt.reason, tt.words)
			}
			if problem := Contradiction(s); (problem != "") != (tt.reason == Invalid) {
				t.Errorf("contradiction: %q", problem)
			}
		})
	}
}

// What belongs to one overlay does not keep containers off the others.
func TestOtherOverlaysContradiction(t *testing.T) {
	s := sound(t)
	s.Overlays[1].MesosBridge.IP6 = netip.MustParsePrefix("fd02::/81")
	if err := get(write(t, s), "dcos", conf.Mesos); err != nil {
		t.Error(err)
	}
}

// Whatever stands in the place of the document is refused at once.
func TestForeignFiles(t *testing.T) {
	for name, place := range map[string]func(path string) error{
		"fifo":             func(p string) error { return unix.Mkfifo(p, 0o600) },
		"device":           func(p string) error { return os.Symlink("/dev/zero", p) },
		"terminal":         func(p string) error { return os.Symlink("/dev/ptmx", p) },
		"directory":        func(p string) error { return os.Mkdir(p, 0o700) },
		"link to itself":   func(p string) error { return os.Symlink(p, p) },
		"endless document": func(p string) error { return os.Symlink("/proc/self/pagemap", p) },
		"gigabytes": func(p string) error {
			return errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, 8<<30))
		},
		"socket": func(p string) error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			return unix.Bind(fd, &unix.SockaddrUnix{Name: p})
		},
		"text":        func(p string) error { return os.WriteFile(p, []byte("hello"), 0o600) },
		"empty":       func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"other shape": func(p string) error { return os.WriteFile(p, []byte(`{"mtu":"x"}`), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := place(filepath.Join(dir, conf.StateFile)); err != nil {
				t.Fatal(err)
			}
			answer := make(chan error, 1)
			go func() { answer <- get(dir, "dcos", conf.Mesos) }()
			select {
			case err := <-answer:
				var e *Error
				if !errors.As(err, &e) || e.Reason != Invalid {
					t.Errorf("got %v, want it invalid", err)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("waits")
			}
		})
	}
	if err := get(t.TempDir(), "dcos", conf.Mesos); err == nil || !strings.Contains(err.Error(), "has not published yet") {
		t.Errorf("without a file: %v", err)
	}
}
