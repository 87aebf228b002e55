package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/pki"
)

func (e *env) loginCommand() *cobra.Command {
	var token, name string
	cmd := &cobra.Command{
		Use: "login --token TOKEN", Short: "get a certificate for overlayctl, with a token of role operator or reader", Args: cobra.NoArgs,
		Example: "  overlayctl login --coordinator https://10.0.0.1:6440 --token ovl1_...",
		RunE:    func(cmd *cobra.Command, _ []string) error { return e.login(cmd.Context(), token, name) },
	}
	cmd.Flags().Var(cli.String(&token, "", "TOKEN"), "token", "what overlayctl token create --role operator printed; required")
	cmd.Flags().Var(cli.String(&name, "", "NAME"), "name", "what the certificate is to call you (default: user and host)")
	return cmd
}

func (e *env) login(ctx context.Context, token, name string) error {
	if token == "" {
		return cli.Usagef("--token is missing; overlayctl token create --role operator prints one, on a coordinator's host")
	}
	if _, err := pki.ParseToken(token); err != nil {
		return cli.Usagef("--token: %w", err)
	}
	urls := e.coordinator
	if len(urls) == 0 {
		if state, err := askAgent(ctx, e.runDir); err == nil {
			urls = state.Coordinators
		}
	}
	if len(urls) == 0 {
		return cli.Usagef("--coordinator is missing, and no agent runs on this host that could tell; give the coordinator's URL, as in https://10.0.0.1:6440")
	}
	if name == "" {
		name = e.person()
	}
	// The old certificate goes when there is a new one.
	dir := e.loginDir()
	fresh := dir + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		return err
	}
	defer os.RemoveAll(fresh)
	m, err := pki.OpenMember(pki.MemberOptions{Dir: fresh, Name: name, Token: func() (string, error) { return token, nil }})
	if err != nil {
		return err
	}
	client, err := api.NewClient(urls, m.Client())
	if err != nil {
		return cli.Usagef("--coordinator: %w", err)
	}
	me, err := client.Whoami(ctx)
	if err != nil {
		return err
	}
	if err := conf.WriteFile(filepath.Join(fresh, coordinatorsFile), []byte(strings.Join(client.URLs(), "\n")+"\n"), 0o600, ""); err != nil {
		return err
	}
	if err := replaceDir(fresh, dir); err != nil {
		return fmt.Errorf("put the login into %s: %w", dir, err)
	}
	_, err = fmt.Fprintf(e.stdout, "logged in as %s %s until %s; key and certificate are in %s\n", me.Role, me.Name, me.Expires.UTC().Format("2006-01-02 15:04 MST"), dir)
	return err
}

// replaceDir has a directory take the place of another one, if there is one, in one step:
// who is killed meanwhile has the old one or the new one. The old one is then where the
// new one was.
func replaceDir(fresh, dir string) error {
	err := unix.Renameat2(unix.AT_FDCWD, fresh, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE)
	if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	// There is none, or the file system (NFS) cannot exchange two.
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(fresh, dir)
}

// person is a name that is unlikely to be somebody else's.
func (e *env) person() string {
	who, host := "user", "host"
	if u, err := user.Current(); err == nil {
		who = u.Username
	}
	if h, err := os.Hostname(); err == nil {
		host = h
	}
	name := fmt.Sprintf("%s@%s-%s", who, host, pki.Suffix())
	if pki.CheckName(name) != nil {
		return "person-" + pki.Suffix()
	}
	return name
}
