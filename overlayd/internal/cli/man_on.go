//go:build man

package cli

import (
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func addMan(root *cobra.Command) {
	root.AddCommand(&cobra.Command{
		Use: "man DIR", Short: "write the man pages", Args: cobra.ExactArgs(1), Hidden: true,
		RunE: func(_ *cobra.Command, args []string) error {
			date := time.Unix(0, 0) // the same sources make the same pages
			root.DisableAutoGenTag = true
			return doc.GenManTree(root, &doc.GenManHeader{Title: root.Name(), Section: "8", Date: &date, Source: "overlay " + root.Version, Manual: "Overlay network"}, args[0])
		},
	})
}
