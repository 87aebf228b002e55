package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// fill makes n attachments through the program itself, the only way in from
// outside.
func (b *box) fill(ctx context.Context, path string, conf map[string]any, n int) error {
	text, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range 8 {
		g.Go(func() error {
			for {
				i := int(next.Add(1))
				if i > n || ctx.Err() != nil {
					return ctx.Err()
				}
				cmd := exec.Command(path)
				call := cni(path, "ADD", "", fmt.Sprintf("fill-%d", i), b.spaces[0].Path, "/nonexistent")
				cmd.Env, cmd.Stdin = call.Env, bytes.NewReader(text)
				if _, err := b.run(cmd); err != nil {
					return err
				}
			}
		})
	}
	return g.Wait()
}

// fillHostLocal writes the files host-local would have after n ADDs, less the
// hours it would take.
func fillHostLocal(dir string, n int) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	addr := netip.MustParseAddr("9.64.0.2")
	for i := range n {
		if err := os.WriteFile(filepath.Join(dir, addr.String()), fmt.Appendf(nil, "fill-%d\r\neth0", i), 0o644); err != nil {
			return err
		}
		addr = addr.Next()
	}
	return os.WriteFile(filepath.Join(dir, "last_reserved_ip.0"), []byte(addr.Prev().String()), 0o644)
}
