package agent

import (
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

func TestOptions(t *testing.T) {
	client, err := api.NewClient([]string{"http://172.17.0.1:6440"}, &http.Client{})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	t.Chdir(dir)
	good := func() Options {
		return Options{
			IP: addr("172.17.0.4"), RunDir: "run", StateDir: "state", Coordinator: client, CoordinatorURLs: client.URLs(),
			Bridges: []conf.Half{conf.Docker, conf.Mesos, conf.Docker},
		}
	}
	a, err := New(good())
	if err != nil {
		t.Fatal(err)
	}
	if a.opts.RunDir != dir+"/run" || a.opts.StateDir != dir+"/state" || a.opts.CNIConfDir != "" {
		t.Errorf("directories %q, %q and %q, want them absolute", a.opts.RunDir, a.opts.StateDir, a.opts.CNIConfDir)
	}
	if diff := cmp.Diff([]conf.Half{conf.Mesos, conf.Docker}, a.opts.Bridges); diff != "" {
		t.Errorf("bridges (-want +got):\n%s", diff)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("New made %v", left)
	}

	for _, tc := range []struct {
		name   string
		change func(*Options)
		want   []string // parts of the error
	}{
		{"id", func(o *Options) { o.ID = "a/b" }, []string{`agent id "a/b"`}},
		{"loopback", func(o *Options) { o.IP = addr("127.0.0.1") }, []string{"127.0.0.1 is not the address of a host that others can reach"}},
		{"link-local", func(o *Options) { o.IP = addr("fe80::1") }, []string{"fe80::1 is a link-local address"}},
		{"mapped", func(o *Options) { o.IP = addr("::ffff:10.0.0.1") }, []string{"IPv4-mapped"}},
		{"half", func(o *Options) { o.Bridges = []conf.Half{"podman"} }, []string{`bridges: half "podman"`}},
		{"no directories", func(o *Options) { o.RunDir, o.StateDir = "", "" }, []string{"run directory: missing", "state directory: missing"}},
		{"one directory", func(o *Options) { o.RunDir = "state/../state" }, []string{"run and state directory are both"}},
		{"long path", func(o *Options) { o.RunDir = "/" + strings.Repeat("x", 100) }, []string{"a socket's path at most 107"}},
		{"listen", func(o *Options) { o.Listen = "6441" }, []string{`listen address "6441"`}},
		{"cooling", func(o *Options) { o.Cooling = -time.Second }, []string{"cooling -1s"}},
		{"no coordinator", func(o *Options) { o.Coordinator = nil }, []string{"coordinator: missing"}},
		{"nothing to tell the IP from", func(o *Options) { o.IP, o.CoordinatorURLs = conf.Peer{}.AgentIP, nil }, []string{"agent IP: give it"}},
		{"several", func(o *Options) { o.ID, o.Listen, o.Coordinator = "-", "x", nil }, []string{"agent id", "listen address", "coordinator"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := good()
			tc.change(&o)
			_, err := New(o)
			for _, want := range tc.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error %v, want it to say %q", err, want)
				}
			}
		})
	}
}
