package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// clusterYAML has one overlay per family mix, and room for the largest run.
const clusterYAML = `
vtep_subnet: 44.0.0.0/8
vtep_subnet6: fd01:a::/64
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: v4, subnet: 9.0.0.0/8, prefix: 24}
  - {name: dual, subnet: 10.0.0.0/8, prefix: 24, subnet6: "fd01:b::/64", prefix6: 80}
`

// startCoordinator runs a coordinator on a node, from an empty store.
func (c *config) startCoordinator(ctx context.Context, node *lab.Node, yaml string) (*lab.Proc, string, error) {
	file := filepath.Join(c.lab.Dir, "overlay.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o644); err != nil {
		return nil, "", err
	}
	url := fmt.Sprintf("http://%s:6440", node.IP)
	p, err := c.lab.Start(node.Netns, "coordinator", filepath.Join(c.bin, "overlayd"), "coordinator", "--insecure",
		"--config", file, "--listen", "0.0.0.0:6440", "--state-dir", filepath.Join(c.lab.Dir, "coordinator"))
	if err != nil {
		return nil, "", err
	}
	return p, url, c.waitReady(ctx, node, url)
}

func (c *config) waitReady(ctx context.Context, node *lab.Node, url string) error {
	client := node.HTTP()
	return lab.Wait(ctx, "the coordinator", 20*time.Second, func() error {
		resp, err := client.Get(url + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != 200 {
			return fmt.Errorf("readyz: %s", resp.Status)
		}
		return nil
	})
}

// agentDirs are the directories of an agent on a node.
func (c *config) runDir(node *lab.Node) string { return filepath.Join(c.lab.Dir, node.Name, "run") }

// startAgent runs an agent and does not wait for it.
func (c *config) startAgent(node *lab.Node, url string) (*lab.Proc, error) {
	dir := filepath.Join(c.lab.Dir, node.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return c.lab.Start(node.Netns, node.Name+".agent", filepath.Join(c.bin, "overlayd"), "agent", "--insecure",
		"--coordinator", url, "--agent-ip", node.IP.String(), "--run-dir", c.runDir(node),
		"--state-dir", filepath.Join(dir, "state"), "--cni-conf-dir", filepath.Join(dir, "net.d"), "--listen", "")
}

// waitOverlays waits until the agent has published every overlay as configured.
func (c *config) waitOverlays(ctx context.Context, node *lab.Node, n int) error {
	return lab.Wait(ctx, "the agent on "+node.Name, 20*time.Second, func() error {
		var state struct {
			Overlays []struct {
				State struct{ Status, Error string }
			}
		}
		b, err := os.ReadFile(filepath.Join(c.runDir(node), "state.json"))
		if err != nil {
			return err
		}
		if err := json.Unmarshal(b, &state); err != nil {
			return err
		}
		ok := 0
		for _, o := range state.Overlays {
			if o.State.Status == "STATUS_OK" {
				ok++
			}
		}
		if ok < n {
			return fmt.Errorf("%d of %d overlays are up: %s", ok, n, strings.TrimSpace(string(b)))
		}
		return nil
	})
}
