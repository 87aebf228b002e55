package ipam

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"overlayd.internal/overlay/conf"
)

// Where an overlay is made anew with other halves while a container of before is there,
// a range of one half has addresses that are filed in the other. They are nobody else's.
func TestInUseInTheOtherHalf(t *testing.T) {
	whole, upper := prefixes("9.0.1.0/29"), prefixes("9.0.1.4/30") // .2 to .6; .6 alone
	dockers := Request{Attachment: att("d"), Half: conf.Docker, Ranges: upper}

	t.Run("never used", func(t *testing.T) {
		b := newBench(t)
		diff(t, "of the half", b.get(dockers).Addrs, addrs("9.0.1.6"))
		for i, want := range []string{"9.0.1.2", "9.0.1.3", "9.0.1.4", "9.0.1.5"} {
			diff(t, "of the pool", b.get(req(fmt.Sprint(i), whole)).Addrs, addrs(want))
		}
		var full *ExhaustedError
		if got, err := b.allocate(req("5", whole)); !errors.As(err, &full) {
			t.Errorf("the last one: %v, %v", got, err)
		}
		// It comes back, as any other, when it has gone.
		diff(t, "released", b.release("d"), addrs("9.0.1.6"))
		diff(t, "the last one", b.get(req("5", whole)).Addrs, addrs("9.0.1.6"))
	})
	t.Run("by name", func(t *testing.T) {
		b := newBench(t)
		b.get(dockers)
		var taken *UnavailableError
		if got, err := b.allocate(req("a", whole, "9.0.1.6")); !errors.As(err, &taken) {
			t.Errorf("%v, %v", got, err)
		}
		b.release("d")
		diff(t, "released", b.get(req("a", whole, "9.0.1.6")).Addrs, addrs("9.0.1.6"))
	})
	t.Run("released in this half before", func(t *testing.T) {
		b := newBench(t)
		for i := range 5 {
			b.get(req(fmt.Sprint(i), whole))
		}
		b.release("4") // .6
		b.now += cooling
		diff(t, "of the half", b.get(dockers).Addrs, addrs("9.0.1.6"))
		var full *ExhaustedError
		if got, err := b.allocate(req("5", whole)); !errors.As(err, &full) {
			t.Errorf("%v, %v", got, err)
		}
		b.release("0")
		diff(t, "another", b.get(req("5", whole)).Addrs, addrs("9.0.1.2"))
	})
	t.Run("Docker's", func(t *testing.T) {
		b := newBench(t)
		b.get(req("m", whole, "9.0.1.6"))
		for _, from := range []string{"9.0.1.4/30", "9.0.1.6/32"} {
			r := single(from)
			r.Half, r.Ranges = conf.Docker, upper
			var full *ExhaustedError
			if got, err := b.single(r); !errors.As(err, &full) {
				t.Errorf("from %s: %v, %v", from, got, err)
			}
		}
		b.release("m")
		r := single("9.0.1.6/32")
		r.Half, r.Ranges = conf.Docker, upper
		if got, err := b.single(r); err != nil || !slices.Equal(got.Addrs, addrs("9.0.1.6")) {
			t.Errorf("%v, %v", got, err)
		}
	})
}
