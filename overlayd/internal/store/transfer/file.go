package transfer

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// fileFormat is the version of a backup.
const fileFormat = 1

// header is the first line of a backup. Each further line is an Entry; the last is
// the footer, and says that the file is whole.
type header struct {
	Format   int       `json:"overlay_backup"`
	Cluster  Cluster   `json:"cluster"`
	Revision uint64    `json:"revision"`
	Taken    time.Time `json:"taken"`
}

type footer struct {
	Entries int    `json:"entries"`
	SHA256  string `json:"sha256"` // of all lines before
}

// Encode writes a backup.
func (c Content) Encode(w io.Writer, now time.Time) error {
	sum := sha256.New()
	out := bufio.NewWriter(io.MultiWriter(w, sum))
	lines := json.NewEncoder(out)
	if err := lines.Encode(header{fileFormat, c.Cluster, c.Revision, now.UTC()}); err != nil {
		return err
	}
	for _, e := range c.Entries {
		if err := lines.Encode(e); err != nil {
			return err
		}
	}
	if err := out.Flush(); err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(footer{len(c.Entries), hex.EncodeToString(sum.Sum(nil))})
}

// Decode reads a backup and checks that it is whole.
func Decode(r io.Reader) (c Content, taken time.Time, err error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return c, taken, err
	}
	damaged := func(what string, args ...any) error {
		return fmt.Errorf("the backup is damaged or none: "+what+"; take another one", args...)
	}
	body := bytes.TrimSuffix(data, []byte("\n"))
	cut := bytes.LastIndexByte(body, '\n')
	if cut < 0 {
		return c, taken, damaged("it has no second line")
	}
	var foot footer
	if err := json.Unmarshal(body[cut+1:], &foot); err != nil || foot.SHA256 == "" {
		return c, taken, damaged("its last line is missing, so it is not whole")
	}
	if sum := sha256.Sum256(data[:cut+1]); hex.EncodeToString(sum[:]) != foot.SHA256 {
		return c, taken, damaged("the checksum does not match")
	}
	lines := json.NewDecoder(bytes.NewReader(data[:cut+1]))
	var head header
	if err := lines.Decode(&head); err != nil {
		return c, taken, damaged("the first line: %v", err)
	}
	if head.Format != fileFormat {
		return c, taken, fmt.Errorf("the backup has format %d and this program knows format %d; use the version that made it", head.Format, fileFormat)
	}
	c.Revision = head.Revision
	for lines.More() {
		var e Entry
		if err := lines.Decode(&e); err != nil {
			return c, taken, damaged("entry %d: %v", len(c.Entries)+1, err)
		}
		c.Entries = append(c.Entries, e)
	}
	if len(c.Entries) != foot.Entries {
		return c, taken, damaged("%d entries, %d are announced", len(c.Entries), foot.Entries)
	}
	return c, head.Taken, c.check()
}
