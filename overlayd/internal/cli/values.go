package cli

import (
	"fmt"
	"net"
	"strings"

	"github.com/spf13/pflag"
)

// value is a flag's value. It remembers the text it was set from.
type value struct {
	arg       string // what the help calls it
	separator string // between the items of a list; empty: not a list
	text      string
	set       func(string) error
}

func (v *value) String() string    { return v.text }
func (v *value) Type() string      { return v.arg }
func (v *value) Separator() string { return v.separator }

func (v *value) Set(s string) error {
	if err := v.set(s); err != nil {
		return err
	}
	v.text = s
	return nil
}

// Func is a value that set reads; an error says what was wanted, as in
// `"here": want an address`. It panics if set refuses the default.
func Func(arg, def string, set func(string) error) pflag.Value { return newValue(arg, "", def, set) }

// ListFunc is Func for a value whose items stand between separators, and which
// may be a list in a configuration file.
func ListFunc(arg, separator, def string, set func(string) error) pflag.Value {
	return newValue(arg, separator, def, set)
}

func newValue(arg, separator, def string, set func(string) error) pflag.Value {
	v := &value{arg: arg, separator: separator, set: set}
	if err := v.Set(def); err != nil {
		panic(fmt.Sprintf("default of a flag: %v", err))
	}
	return v
}

// String is any text; arg is what the help calls it.
func String(to *string, def, arg string) pflag.Value {
	return Func(arg, def, func(s string) error {
		*to = s
		return nil
	})
}

// Choice is one of some words.
func Choice(to *string, def string, words ...string) pflag.Value {
	return Func(strings.Join(words, "|"), def, func(s string) error {
		for _, w := range words {
			if s == w {
				*to = s
				return nil
			}
		}
		return fmt.Errorf("%q: want %s", s, strings.Join(words, " or "))
	})
}

// Listen is an address and a port to listen on. It may be empty where the
// default is, or with optional.
func Listen(to *string, def string, optional bool) pflag.Value {
	return Func("ADDR", def, func(s string) error {
		if s == "" && optional {
			*to = ""
			return nil
		}
		_, port, err := net.SplitHostPort(s)
		if err == nil {
			_, err = net.LookupPort("tcp", port)
		}
		if err != nil || port == "" {
			return fmt.Errorf("%q: want an address and a port, as in 0.0.0.0:6440", s)
		}
		*to = s
		return nil
	})
}

// List is items with a separator between them; no item may be empty.
func List(to *[]string, separator, def, arg string) pflag.Value {
	return ListFunc(arg, separator, def, func(s string) error {
		var items []string
		if s != "" {
			items = strings.Split(s, separator)
		}
		for _, item := range items {
			if item == "" {
				return fmt.Errorf("%q: an item between two %q is empty", s, separator)
			}
		}
		*to = items
		return nil
	})
}

// explain says what a flag wants where its kind is one of pflag's own, whose
// errors are those of strconv and time.
func explain(f *pflag.Flag, given string, err error) error {
	switch f.Value.Type() {
	case "bool":
		return fmt.Errorf("%q: want true or false", given)
	case "duration":
		return fmt.Errorf("%q: want a time, as in 90s or 5m", given)
	case "int", "int64", "uint", "uint16", "uint32", "uint64":
		return fmt.Errorf("%q: want a whole number in range", given)
	}
	return err
}
