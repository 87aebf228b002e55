package conf

import (
	"encoding/json"
	"fmt"
)

// Isolation says from whom the containers of an overlay are kept apart. It holds
// what the configuration says; Mode is what that means.
type Isolation string

// The modes. In configurations and JSON, true stands for overlay and false for
// none, as before there were three. Nothing at all means overlay.
const (
	// IsolationOverlay: no connection from or to containers of other overlays,
	// whatever address of a host they use; hosts and what is outside are not
	// concerned.
	IsolationOverlay Isolation = "overlay"
	// IsolationStrict: as overlay, and none from or to hosts of the cluster but
	// ICMP with the own gateway, and from outside only to published ports.
	IsolationStrict Isolation = "strict"
	// IsolationNone: overlays without isolation reach each other, as in DC/OS.
	IsolationNone Isolation = "none"

	isolationTrue  Isolation = "true"
	isolationFalse Isolation = "false"
)

// IsolationOf is what true and false in a configuration stand for.
func IsolationOf(isolated bool) Isolation {
	if isolated {
		return isolationTrue
	}
	return isolationFalse
}

// ParseIsolation reads one of the three modes.
func ParseIsolation(s string) (Isolation, error) {
	switch i := Isolation(s); i {
	case IsolationOverlay, IsolationStrict, IsolationNone:
		return i, nil
	}
	return "", fmt.Errorf("%q: want overlay, strict or none (or true or false, without quotes)", s)
}

// Mode is one of the three modes.
func (i Isolation) Mode() Isolation {
	switch i {
	case IsolationStrict, IsolationNone:
		return i
	case isolationFalse:
		return IsolationNone
	}
	return IsolationOverlay
}

// MarshalJSON writes what the configuration said.
func (i Isolation) MarshalJSON() ([]byte, error) {
	if i == isolationTrue || i == isolationFalse {
		return []byte(i), nil
	}
	return json.Marshal(string(i))
}

// UnmarshalJSON reads what MarshalJSON wrote.
func (i *Isolation) UnmarshalJSON(b []byte) error {
	switch string(b) {
	case "true", "false":
		*i = Isolation(b)
		return nil
	case "null":
		return nil
	}
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("isolation: want overlay, strict, none, true or false, have %s", b)
	}
	v, err := ParseIsolation(s)
	if err != nil {
		return fmt.Errorf("isolation: %w", err)
	}
	*i = v
	return nil
}
