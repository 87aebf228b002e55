//go:build !man

package cli

import "github.com/spf13/cobra"

// addMan adds the command that writes the man pages, in builds for that alone:
// the library that makes them would double what a program loads.
func addMan(*cobra.Command) {}
