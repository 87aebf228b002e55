package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// importStateCommand is overlayctl's command of that name, for those who look for
// it beside check-config.
func importStateCommand() *cobra.Command {
	return &cobra.Command{
		Use: "import-state [FILE] [flags]", Short: "reserve for the hosts of a DC/OS cluster what they hold there; the same as overlayctl import-state",
		Example:            "  overlayd import-state state.json\n  overlayctl import-state --help",
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if slices.Contains(args, "--help") || slices.Contains(args, "-h") {
				return cmd.Help()
			}
			path, err := overlayctl()
			if err != nil {
				return err
			}
			argv := append([]string{path, cmd.Name()}, args...)
			return fmt.Errorf("run %s: %w", path, unix.Exec(path, argv, os.Environ()))
		},
	}
}

// overlayctl finds the program beside this one, else in the path.
func overlayctl() (string, error) {
	const name = "overlayctl"
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("this command is overlayctl's, and %w; install overlayctl", err)
	}
	return path, nil
}
