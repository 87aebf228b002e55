package rtnl

import (
	"os"
	"testing"
)

// Looking for a name leaves the socket as it was, so that it can be used for more.
func TestHas(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: a socket is bound to a device")
	}
	c, err := Open()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 2 {
		for name, want := range map[string]bool{"lo": true, "no-such-device": false} {
			if got, err := c.Has(name); got != want || err != nil {
				t.Errorf("%s: %v, %v, want %v", name, got, err, want)
			}
		}
	}
	if i, ok, err := c.Find("lo"); i.Index != 1 || !ok || err != nil {
		t.Errorf("lo: %+v, %v, %v", i, ok, err)
	}
}
