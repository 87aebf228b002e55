package attach

import (
	"fmt"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/mark"
)

// Whoever removes links removes those of all that wait for him, also of one that was
// killed meanwhile; one that stands still keeps nobody for long.
func TestRemoveTogether(t *testing.T) {
	m := newMachine(t)
	del := func(id string) call { return call{command: "DEL", id: id, conf: m.config("both", "1.0.0")} }
	var ids []string
	var containers []namespace
	for i := range 6 {
		ids, containers = append(ids, fmt.Sprintf("c%d", i)), append(containers, newNamespace(t))
		m.add(call{id: ids[i], netns: containers[i].path, conf: m.config("both", "1.0.0")})
	}
	killed, ids := ids[0], ids[1:]
	name := mark.HostEnd(conf.Docker, conf.Attachment{Network: "both", ContainerID: killed, IfName: "eth0"}.Key())
	l, err := m.host.LinkByName(name)
	if err == nil {
		err = m.host.LinkSetGroup(l, goingGroup)
	}
	if err != nil {
		t.Fatal(err)
	}
	still := openTurn(m.run)
	defer still.close()
	if !still.try(removing, unix.F_WRLCK) {
		t.Fatal("somebody removes a link")
	}
	var all sync.WaitGroup
	for _, id := range ids {
		all.Go(func() {
			if out := m.exec(del(id)); out.status != 0 {
				t.Errorf("DEL of %s: exit %d\n%s%s", id, out.status, out.stdout, out.stderr)
			}
		})
	}
	all.Wait()
	if f := m.left(); len(f.links) != 0 || len(f.records) != 1 {
		t.Errorf("left: %+v, want the address of the one that was killed", f)
	}
	m.ok(del(killed))
	m.wantNothing(containers...)
}
