package main

import (
	"context"
	"fmt"
	"html"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/page"
	"overlayd.internal/overlay/overlayd/internal/page/door"
	"overlayd.internal/overlay/overlayd/internal/serve"
)

// pageFlags are the flags of overlayctl page.
type pageFlags struct {
	open bool
	port uint16
	idle time.Duration
}

func (e *env) pageCommand() *cobra.Command {
	var f pageFlags
	cmd := &cobra.Command{
		Use: "page [--open]", Short: "show the coordinator's page in a browser on this host", Args: cobra.NoArgs,
		Long: `Show the coordinator's page in a browser on this host, as the one who logged in.

Prints a link to 127.0.0.1 that works once, for one browser, and serves the page
behind it until it is interrupted, or nobody has looked for a while. Only what the
page reads passes. To look from another machine:
ssh -L 8080:127.0.0.1:8080 HOST overlayctl page --port 8080`,
		Example: "  overlayctl page --open",
		RunE:    func(cmd *cobra.Command, _ []string) error { return e.runPage(cmd.Context(), f) },
	}
	cmd.Flags().BoolVar(&f.open, "open", false, "open the link in the browser of this desktop, too")
	cmd.Flags().Uint16Var(&f.port, "port", 0, "port to serve on (default: any that is free)")
	cmd.Flags().DurationVar(&f.idle, "idle", 30*time.Minute, "how long nobody may look before it ends")
	return cmd
}

func (e *env) runPage(ctx context.Context, f pageFlags) error {
	if f.idle <= 0 {
		return cli.Usagef("--idle %s: want a duration above 0, as in 30m", f.idle)
	}
	client, err := e.client(ctx)
	if err != nil {
		return err
	}
	resp, err := client.Pass(ctx, page.Path, nil)
	if err != nil {
		return err
	}
	resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return fmt.Errorf("the coordinator has no page; it is older than overlayctl %s", version)
	default: // says why, as with every other command
		if _, err := client.Overlays(ctx); err != nil {
			return err
		}
		return fmt.Errorf("GET %s: the coordinator answers %s", page.Path, resp.Status)
	}
	l, err := serve.ListenTCP(ctx, "127.0.0.1:"+strconv.Itoa(int(f.port)))
	if err != nil {
		return fmt.Errorf("--port: %w", err)
	}
	defer l.Close()
	d := door.New(door.Options{Client: client, Idle: f.idle, Log: slog.New(slog.DiscardHandler)})
	link := d.Link(l)
	fmt.Fprintf(e.stderr, "The page, for one browser on this host, until ctrl-C or until nobody has looked for %s:\n", f.idle)
	if _, err := fmt.Fprintln(e.stdout, link); err != nil {
		return err
	}
	if f.open {
		clean, err := openLink(ctx, link, e.stderr)
		if err != nil {
			fmt.Fprintf(e.stderr, "the browser cannot be opened, open the link yourself: %v\n", err)
		}
		defer clean()
	}
	return d.Serve(ctx, l)
}

// openLink opens a link in the browser. Others on this host can read command
// lines, so the link stands in a file that is ours alone.
func openLink(ctx context.Context, link string, stderr io.Writer) (clean func(), err error) {
	dir, err := os.MkdirTemp("", "overlayctl-page-")
	if err != nil {
		return func() {}, err
	}
	clean = func() { os.RemoveAll(dir) }
	file := filepath.Join(dir, "page.html")
	text := `<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=` + html.EscapeString(link) + `"><title>Overlay network</title>` + "\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return clean, err
	}
	cmd := exec.CommandContext(ctx, "xdg-open", file)
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		return clean, err
	}
	go cmd.Wait() // the browser may stay its child
	return clean, nil
}
