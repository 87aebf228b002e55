package ipam

import (
	stdlib "hash/crc32"
	"testing"

	"pgregory.net/rapid"
)

func TestCRC(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		sum, b := rapid.Uint32().Draw(t, "sum"), rapid.SliceOf(rapid.Byte()).Draw(t, "bytes")
		if got, want := crc32(sum, b), stdlib.Update(sum, stdlib.IEEETable, b); got != want {
			t.Fatalf("crc32(%#x, %x) = %#x, want %#x", sum, b, got, want)
		}
	})
}
