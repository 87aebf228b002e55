package conf

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestCleanName(t *testing.T) {
	for _, tt := range [][2]string{
		{"web-1", "web-1"},
		{"default/web_1.a", "default/web_1.a"},
		{"größe 東京", "größe 東京"},
		{"", ""},
		{"a\x1b[31mb\x00\n\rc\u202e", "a[31mbc"}, // the last one turns what follows round
		{"x\xff\xfey", "xy"},
	} {
		if got := CleanName(tt[0]); got != tt[1] {
			t.Errorf("CleanName(%q) = %q, want %q", tt[0], got, tt[1])
		}
	}
	for _, huge := range []string{strings.Repeat("x", 1<<20), strings.Repeat("東", 1<<16), strings.Repeat("\xff", 4096) + "x"} {
		got := CleanName(huge)
		if len(got) > MaxName || !utf8.ValidString(got) {
			t.Errorf("of %d bytes %d are kept: %.20q", len(huge), len(got), got)
		}
	}
	if got := CleanName(strings.Repeat("x", MaxName)); len(got) != MaxName {
		t.Errorf("a name that fits has %d bytes, want all %d", len(got), MaxName)
	}
}
