package coordinator

import (
	"encoding/json"
	"testing"

	"overlayd.internal/overlay/conf"
)

// A setting that the plan has no words for is a change all the same, and so is any
// other difference: what is not a change would not be applied.
func TestEveryDifferenceIsAChange(t *testing.T) {
	type newer struct {
		conf.Overlay
		Colour string `json:"colour,omitempty"`
	}
	d := differ{c: &Coordinator{}, hosts: nil}
	d.others("", newer{Colour: "red"}, newer{}, 7, "name")
	d.others("", newer{}, newer{Colour: "blue"}, 7, "name")
	d.others("", newer{Colour: "red"}, newer{Colour: "red"}, 7, "name")
	var got []string
	for _, c := range d.plan.Changes {
		got = append(got, c.What)
	}
	if b, _ := json.Marshal(got); string(b) != `["colour \"red\" -\u003e (none)","colour (none) -\u003e \"blue\""]` {
		t.Errorf("changes %s", b)
	}
}
