package conf_test

import (
	"encoding/json"
	"testing"

	"overlayd.internal/overlay/conf"
)

func TestNetConf(t *testing.T) {
	tests := []struct {
		name, in                     string
		overlay, statePath, ipamPath string
		hairpin                      bool
	}{
		{"defaults, unknown keys", `{"name":"dcos","type":"m-overlay","colour":{"a":1}}`,
			"dcos", "/run/overlay/state.json", "/run/overlay/ipam", true},
		{"own keys", `{"name":"net","overlay":"dcos","runDir":"/tmp/a","hairpinMode":false}`,
			"dcos", "/tmp/a/state.json", "/tmp/a/ipam", false},
		{"under ipam, for a foreign main plugin", `{"name":"net","ipam":{"type":"overlay-ipam","overlay":"dcos","runDir":"/tmp/b"}}`,
			"dcos", "/tmp/b/state.json", "/tmp/b/ipam", true},
		{"the top wins over ipam", `{"name":"net","overlay":"a","runDir":"/a","ipam":{"overlay":"b","runDir":"/b"}}`,
			"a", "/a/state.json", "/a/ipam", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var n conf.NetConf
			if err := json.Unmarshal([]byte(tt.in), &n); err != nil {
				t.Fatal(err)
			}
			if n.OverlayName() != tt.overlay || n.StatePath() != tt.statePath || n.IPAMPath() != tt.ipamPath || n.Hairpin() != tt.hairpin {
				t.Errorf("overlay %q, state %q, ipam %q, hairpin %v; want %q, %q, %q, %v",
					n.OverlayName(), n.StatePath(), n.IPAMPath(), n.Hairpin(), tt.overlay, tt.statePath, tt.ipamPath, tt.hairpin)
			}
		})
	}
}

// TestGCListAbsentIsNotEmpty: an empty list means that nothing is in use, no
// list means that nothing is known.
func TestGCListAbsentIsNotEmpty(t *testing.T) {
	var absent, empty conf.NetConf
	if err := json.Unmarshal([]byte(`{}`), &absent); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(`{"cni.dev/valid-attachments":[],"cni.dev/attachments":[]}`), &empty); err != nil {
		t.Fatal(err)
	}
	if absent.ValidAttachments != nil || absent.LegacyValidAttachments != nil {
		t.Error("an absent list was read as one")
	}
	if empty.ValidAttachments == nil || empty.LegacyValidAttachments == nil {
		t.Error("an empty list was read as absent")
	}
}
