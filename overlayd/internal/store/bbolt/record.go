package bbolt

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"hash/fnv"
	"sync"

	"overlayd.internal/overlay/overlayd/internal/store"
)

// A record is create (8 bytes), mod (8 bytes), checksum (4 bytes), value. The
// checksum is CRC-32C over the key, create, mod and value: bbolt has none over
// its data pages, and half of all flipped bits there go unnoticed otherwise.
const recordHeader = 8 + 8 + 4

// castagnoli is made when it is first used: most runs of overlayd, the agent's
// among them, open no store.
var castagnoli = sync.OnceValue(func() *crc32.Table { return crc32.MakeTable(crc32.Castagnoli) })

func encode(key []byte, create, mod uint64, value []byte) []byte {
	b := make([]byte, 0, recordHeader+len(value))
	b = binary.BigEndian.AppendUint64(b, create)
	b = binary.BigEndian.AppendUint64(b, mod)
	b = binary.BigEndian.AppendUint32(b, checksum(key, b, value))
	return append(b, value...)
}

func checksum(key, revisions, value []byte) uint32 {
	sum := crc32.Update(0, castagnoli(), key)
	sum = crc32.Update(sum, castagnoli(), revisions)
	return crc32.Update(sum, castagnoli(), value)
}

// decode copies: what bbolt hands out is gone when its transaction ends.
func decode(key, b []byte) (store.KV, error) {
	if len(b) < recordHeader {
		return store.KV{}, damagedf("key %q: record of %d bytes", key, len(b))
	}
	value := b[recordHeader:]
	if binary.BigEndian.Uint32(b[16:]) != checksum(key, b[:16], value) {
		return store.KV{}, damagedf("key %q: checksum does not match", key)
	}
	return store.KV{
		Key:    string(key),
		Value:  append([]byte{}, value...),
		Create: binary.BigEndian.Uint64(b),
		Mod:    binary.BigEndian.Uint64(b[8:]),
	}, nil
}

// fingerprint stands for one record, or for the revision, in the digest of the
// file, which is the sum of all of them. A page that has lost an element is
// sound in itself, and so are the records that are left: the digest misses it.
func fingerprint(key, value []byte) uint64 {
	h := fnv.New64a()
	h.Write(key)
	h.Write([]byte{0})
	h.Write(value)
	return h.Sum64()
}

// damagedf is the error of a file that is not what a store wrote.
func damagedf(format string, args ...any) error {
	return fmt.Errorf("the file is damaged or not a coordinator's store: %s; put back a copy of it, or move it away to start with an empty store",
		fmt.Sprintf(format, args...))
}
