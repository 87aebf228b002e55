package attach

import (
	"os"
	"regexp"
	"slices"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/veth"
)

// crashPoints finds the calls of crash in the files named.
func crashPoints(t *testing.T, files ...string) (out []string) {
	t.Helper()
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range regexp.MustCompile(`\tcrash\("(\w+)"\)`).FindAllSubmatch(b, -1) {
			out = append(out, string(match[1]))
		}
	}
	if len(out) == 0 {
		t.Fatalf("no crash points in %v", files)
	}
	return out
}

// TestCrash kills ADD and DEL at every point and does one thing after it. In
// between no interface may have an address that is free, and at the end nothing
// may be left.
func TestCrash(t *testing.T) {
	bin, err := crashing()
	if err != nil {
		t.Fatal(err)
	}
	followUps := []struct {
		name string
		do   func(m *machine, container namespace, c call)
	}{
		{"DEL", func(m *machine, _ namespace, c call) {}},
		{"DEL without netns", func(m *machine, _ namespace, c call) {
			c.command, c.netns = "DEL", ""
			m.ok(c)
		}},
		{"DEL with netns gone", func(m *machine, container namespace, c call) {
			container.remove()
			c.command = "DEL"
			m.ok(c)
		}},
		{"GC", func(m *machine, _ namespace, c call) {
			m.age("both", "c1")
			m.ok(call{command: "GC", conf: m.config("both", "1.1.0", "cni.dev/valid-attachments", []string{})})
			m.wantNothing()
		}},
		{"ADD again", func(m *machine, _ namespace, c call) {
			c.command = "ADD"
			m.exec(c) // may be refused: there is an interface already
			m.wantConsistent()
		}},
		{"ADD again in another namespace", func(m *machine, _ namespace, c call) {
			c.command, c.netns = "ADD", newNamespace(m.t).path
			m.exec(c)
			m.wantConsistent()
		}},
	}
	sweep := func(command string, points []string) {
		for _, point := range points {
			for _, f := range followUps {
				t.Run(command+" killed at "+point+", then "+f.name, func(t *testing.T) {
					m := newMachine(t)
					m.bin = bin
					container := newNamespace(t)
					c := call{netns: container.path, conf: m.config("both", "1.1.0")}
					if command == "DEL" {
						m.add(c)
					}
					killed := c
					killed.command, killed.env = command, []string{"OVERLAY_CRASH=" + point}
					if out := m.exec(killed); out.status != -1 {
						t.Fatalf("%s was not killed: exit %d\n%s%s", command, out.status, out.stdout, out.stderr)
					}
					m.wantConsistent()
					f.do(m, container, c)
					c.command = "DEL"
					m.ok(c)
					m.wantNothing()

					fresh := newNamespace(t)
					c.command, c.netns = "ADD", fresh.path
					m.ok(c)
				})
			}
		}
	}
	sweep("ADD", crashPoints(t, "add.go", "kernel.go"))
	sweep("DEL", crashPoints(t, "del.go", "remove.go"))
}

// wantConsistent: every interface has its addresses recorded as in use.
func (m *machine) wantConsistent() {
	m.t.Helper()
	var links []veth.Link
	m.host.inside(m.t, func() (err error) { links, err = veth.List(); return err })
	records := m.records("both")
	for _, l := range links {
		found := false
		for _, r := range records {
			found = found || r.Attachment == l.Attachment && slices.Equal(r.Addrs, l.Addrs) && r.Half == conf.Docker
		}
		if !found {
			m.t.Errorf("%s has addresses %v, which are free: %v", l.Name, l.Addrs, records)
		}
	}
}
