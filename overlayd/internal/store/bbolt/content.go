package bbolt

import (
	"encoding/binary"
	"errors"
	"fmt"

	"go.etcd.io/bbolt"
)

// prepare makes the buckets of a new file, checks those of an old one, and
// returns the revision of the last transaction.
func prepare(db *bbolt.DB) (revision uint64, err error) {
	fresh := false
	err = db.View(func(tx *bbolt.Tx) error {
		meta, kv := tx.Bucket(bucketMeta), tx.Bucket(bucketKV)
		if name, _ := tx.Cursor().First(); name == nil {
			fresh = true
			return nil
		} else if meta == nil || kv == nil {
			return fmt.Errorf("it is a bbolt file of another program (it has a bucket %q); give another path", name)
		}
		f := meta.Get(keyFormat)
		if len(f) != 8 {
			return damagedf("the format of the file is not recorded in it")
		}
		if n := binary.BigEndian.Uint64(f); n != format {
			return fmt.Errorf("it has format %d and this program knows format %d; run the version that wrote it", n, format)
		}
		if revision, err = readRevision(tx); err != nil {
			return err
		}
		digest, err := readDigest(meta)
		if err != nil {
			return err
		}
		return checkRecords(kv, revision, digest)
	})
	if fresh {
		err = db.Update(create)
	}
	return revision, err
}

func create(tx *bbolt.Tx) error {
	if _, err := tx.CreateBucket(bucketKV); err != nil {
		return err
	}
	meta, err := tx.CreateBucket(bucketMeta)
	if err != nil {
		return err
	}
	revision := number(0)
	return errors.Join(
		meta.Put(keyFormat, number(format)),
		meta.Put(keyRevision, revision),
		meta.Put(keyDigest, number(fingerprint(keyRevision, revision))))
}

func number(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func readRevision(tx *bbolt.Tx) (uint64, error) {
	r := tx.Bucket(bucketMeta).Get(keyRevision)
	if len(r) != 8 {
		return 0, damagedf("the revision is not recorded in it")
	}
	return binary.BigEndian.Uint64(r), nil
}

func readDigest(meta *bbolt.Bucket) (uint64, error) {
	d := meta.Get(keyDigest)
	if len(d) != 8 {
		return 0, damagedf("the digest is not recorded in it")
	}
	return binary.BigEndian.Uint64(d), nil
}

// checkRecords reads every record once, and compares their digest with the one
// that was written.
func checkRecords(kv *bbolt.Bucket, revision, digest uint64) error {
	sum := fingerprint(keyRevision, number(revision))
	err := kv.ForEach(func(k, v []byte) error {
		sum += fingerprint(k, v)
		r, err := decode(k, v)
		if err != nil {
			return err
		}
		if r.Mod > revision {
			return damagedf("key %q has revision %d, which is after the last one, %d", k, r.Mod, revision)
		}
		return nil
	})
	if err == nil && sum != digest {
		err = damagedf("the digest of what it holds is %016x and should be %016x, so records are missing", sum, digest)
	}
	return err
}
