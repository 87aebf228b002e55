package attach

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// sources is what the kernel lets the containers of the machine send from.
func (m *machine) sources() (out string) {
	m.t.Helper()
	m.host.inside(m.t, func() error {
		b, err := exec.Command("nft", "list", "table", "bridge", mark.NFTable).CombinedOutput()
		out = string(b)
		if err != nil && strings.Contains(out, "No such file") {
			out, err = "", nil
		}
		return err
	})
	return out
}

// A container sends from what ADD gave it, also with a MAC of its own choice and
// several addresses, until DEL or GC, however little those find.
func TestProtect(t *testing.T) {
	att := conf.Attachment{Network: "both", ContainerID: "c1", IfName: "eth0"}
	device := mark.HostEnd(conf.Docker, att.Key())
	for _, tt := range []struct {
		name    string
		arrange func(m *machine, container namespace, c *call)
	}{
		{"DEL", func(*machine, namespace, *call) {}},
		{"DEL, namespace gone", func(_ *machine, container namespace, _ *call) { container.remove() }},
		{"DEL, rules flushed", func(m *machine, _ namespace, _ *call) {
			m.host.inside(m.t, exec.Command("nft", "flush", "ruleset").Run)
		}},
		{"GC", func(m *machine, _ namespace, c *call) {
			m.age("both", "c1")
			c.command, c.conf = "GC", m.config("both", "1.1.0", "cni.dev/valid-attachments", []string{})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMachine(t)
			container := newNamespace(t)
			c := call{id: "c1", netns: container.path, conf: m.config("both", "1.0.0", "runtimeConfig", map[string]any{"mac": "02:00:00:00:00:09"})}
			r := m.add(c)
			got := strings.Join(strings.Fields(m.sources()), " ")
			for _, a := range append(addrsOf(r), mark.LinkLocal(conf.MAC{2, 0, 0, 0, 0, 9})) {
				if want := fmt.Sprintf("%q . 02:00:00:00:00:09 . %s", device, a); !strings.Contains(got, want) {
					t.Errorf("the kernel does not have %s:\n%s", want, got)
				}
			}
			ping(t, container, addrOf(r.IPs[0].Gateway))
			c.command = "DEL"
			tt.arrange(m, container, &c)
			m.ok(c)
			if got := m.sources(); strings.Contains(got, device) {
				t.Errorf("left behind:\n%s", got)
			}
		})
	}
}

// What is not to be checked is not. (That a failed ADD leaves nothing is asked by
// the tests of failures, with wantNothing.)
func TestProtectNot(t *testing.T) {
	m := newMachine(t)
	off := false
	for _, tt := range []struct {
		name string
		conf map[string]any
		set  *bool
		want bool
	}{
		{"network says no", m.config("dcos", "1.0.0", "antispoof", false), nil, false},
		{"overlay says no", m.config("dcos", "1.0.0", "antispoof", true), &off, false},
		{"both say yes", m.config("dcos", "1.0.0", "antispoof", true), nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for i := range m.state.Overlays {
				m.state.Overlays[i].Info.AntiSpoof = tt.set
			}
			m.publish()
			c := call{id: "c2", netns: newNamespace(t).path, conf: tt.conf}
			m.add(c)
			if got := strings.Contains(m.sources(), "9.0.1.13"); got != tt.want {
				t.Errorf("checked: %v, want %v\n%s", got, tt.want, m.sources())
			}
			c.command = "DEL"
			m.ok(c)
		})
	}
}
