package engines

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"runtime"
	"strings"
)

// The images containers are launched from. They are made by hand from the
// machine's static busybox, so no registry is asked for anything.
const (
	// Image serves a page: run "serve TEXT".
	Image = "docker.io/library/page:test"
	// PauseImage does nothing until it is asked to end, as the first container
	// of a sandbox has to.
	PauseImage = "docker.io/library/pause:test"
)

// serveScript answers every request on port 80 with its argument. It ends when
// asked to: process 1 gets no signal it does not catch.
const serveScript = `#!/bin/sh
trap 'exit 0' TERM INT
mkdir -p /www
echo "$1" >/www/index.html
httpd -p 80 -h /www
while :; do sleep 3600 & wait $!; done
`

const pauseScript = `#!/bin/sh
trap 'exit 0' TERM INT
while :; do sleep 3600 & wait $!; done
`

// writeImages writes both images as one archive in the format of "docker save",
// which every engine reads.
func writeImages(ctx context.Context, name string) error {
	layer, err := rootfs(ctx)
	if err != nil {
		return fmt.Errorf("make a root file system from busybox: %w", err)
	}
	diffID := sha256.Sum256(layer)

	type manifest struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	var manifests []manifest
	files := map[string][]byte{"layer.tar": layer}
	for _, image := range []struct{ tag, program string }{{Image, "/bin/sh"}, {PauseImage, "/bin/pause"}} {
		config, err := json.Marshal(map[string]any{
			"architecture": runtime.GOARCH,
			"os":           "linux",
			"config":       map[string]any{"Cmd": []string{image.program}, "Env": []string{"PATH=/bin"}},
			"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(diffID[:])}},
		})
		if err != nil {
			return err
		}
		id := sha256.Sum256(config)
		configName := hex.EncodeToString(id[:]) + ".json"
		files[configName] = config
		manifests = append(manifests, manifest{configName, []string{image.tag}, []string{"layer.tar"}})
	}
	if files["manifest.json"], err = json.Marshal(manifests); err != nil {
		return err
	}

	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for name, content := range files {
		if err := addFile(w, name, 0o644, content); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return os.WriteFile(name, archive.Bytes(), 0o644)
}

// rootfs is a tar of a root file system: busybox under all its names and the
// two scripts.
func rootfs(ctx context.Context) ([]byte, error) {
	file, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	busybox, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	applets, err := exec.CommandContext(ctx, file, "--list").Output()
	if err != nil {
		return nil, err
	}

	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, dir := range []string{"bin", "dev", "etc", "proc", "sys", "tmp"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}); err != nil {
			return nil, err
		}
	}
	for _, f := range []struct {
		name    string
		mode    int64
		content []byte
	}{
		{"bin/busybox", 0o755, busybox},
		{"bin/serve", 0o755, []byte(serveScript)},
		{"bin/pause", 0o755, []byte(pauseScript)},
		{"etc/passwd", 0o644, []byte("root:x:0:0:root:/:/bin/sh\n")},
		{"etc/group", 0o644, []byte("root:x:0:\n")},
	} {
		if err := addFile(w, f.name, f.mode, f.content); err != nil {
			return nil, err
		}
	}
	for applet := range strings.FieldsSeq(string(applets)) {
		if applet == "busybox" {
			continue
		}
		link := tar.Header{Typeflag: tar.TypeSymlink, Name: path.Join("bin", applet), Linkname: "busybox", Mode: 0o777}
		if err := w.WriteHeader(&link); err != nil {
			return nil, err
		}
	}
	return layer.Bytes(), w.Close()
}

func addFile(w *tar.Writer, name string, mode int64, content []byte) error {
	h := tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))}
	if err := w.WriteHeader(&h); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}
