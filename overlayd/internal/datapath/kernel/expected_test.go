package kernel

import (
	"maps"
	"testing"
)

// Whichever map is the larger, what is wanted takes the place of what was had, and
// the rest stays.
func TestUpdated(t *testing.T) {
	for _, want := range []map[int]int{
		{}, {2: 20}, {1: 10, 2: 20, 3: 30, 4: 40, 5: 50},
	} {
		m, had := map[int]int{1: 1, 2: 2, 6: 6}, map[int]int{1: 1}
		expected := map[int]int{2: 2, 6: 6}
		maps.Copy(expected, want)
		if got := updated(m, had, want); !maps.Equal(got, expected) {
			t.Errorf("got %v, want %v", got, expected)
		}
	}
}
