package attach

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/document"
	"overlayd.internal/overlay/internal/cni"
	"overlayd.internal/overlay/internal/mark"
)

// A late context is over as soon as an interface of that name is there, as that of a
// program is which was stopped between the address and the interface.
type late struct {
	context.Context
	interfaceName string
}

func (l late) Err() error {
	b, err := os.ReadFile("/proc/thread-self/net/dev")
	if err == nil && strings.Contains(string(b), l.interfaceName+":") {
		err = context.DeadlineExceeded
	}
	return err
}

// Whose time is over when its interface is there may have been stopped since it has its
// address, and then somebody else may have that by now: the sweeper releases what has no
// interface after a minute, and GC does.
func TestLateAdd(t *testing.T) {
	for name, more := range map[string][]any{
		"ours":                  nil,
		"another's IPAM plugin": {"ipam", map[string]any{"type": "other"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.script("other", `[ $CNI_COMMAND = DEL ] || echo '{"cniVersion":"1.1.0","ips":[{"address":"9.0.1.140/25"}]}'`)
			container := newNamespace(t)
			text, err := json.Marshal(m.config("dcos", "1.1.0", more...))
			if err != nil {
				t.Fatal(err)
			}
			c := &cni.Call{Command: "ADD", ContainerID: "c1", IfName: "eth0", NetNS: container.path, Path: m.path, Stdin: text, Stderr: t.Output()}
			if err := errors.Join(document.ReadConf(text, &c.Conf)); err != nil {
				t.Fatal(err)
			}
			ctx := late{t.Context(), mark.HostEnd(conf.Docker, c.Attachment().Key())}
			m.host.inside(t, func() error {
				_, _, err = New(conf.Docker).Add(ctx, c)
				return nil
			})
			var refused *types.Error
			if !errors.As(err, &refused) || refused.Code != types.ErrTryAgainLater {
				t.Errorf("ADD: %v, want code %d", err, types.ErrTryAgainLater)
			}
			m.wantNothing(container)
		})
	}
}
