package iptables

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// The names of the flavours, behind those of the programs.
const (
	nftFlavour    = "-nft"
	legacyFlavour = "-legacy"
)

// otherFlavour is that flavour of a family which is not in use. What an earlier run
// made of it stays when somebody has the name iptables lead to the other one
// (update-alternatives): the kernel would ask both, and keep the sets of both.
type otherFlavour struct {
	program string // that the name led to; empty: none was looked at
	removed bool
}

// removeOther takes our chains of the flavour away that is not in use.
func (f *Firewall) removeOther(ctx context.Context) (changed int, err error) {
	var errs []error
	for i := range f.families {
		n, err := f.other[i].remove(ctx, f.families[i])
		changed += n
		errs = append(errs, err)
	}
	return changed, errors.Join(errs...)
}

func (o *otherFlavour) remove(ctx context.Context, used family) (changed int, err error) {
	program, err := exec.LookPath(used.command())
	if err != nil {
		return 0, nil // nothing tells which one it is
	}
	if path, err := filepath.EvalSymlinks(program); err == nil {
		program = path
	}
	if program != o.program {
		*o = otherFlavour{program: program}
	}
	if o.removed {
		return 0, nil
	}
	other := family{ip6: used.ip6}
	if other.flavour, err = used.unused(ctx, program); err != nil {
		return 0, err
	}
	if other.flavour == legacyFlavour {
		// To ask for tables that are not there would make them.
		if tables, err := legacyTables(other.ip6); err != nil || len(tables) == 0 {
			o.removed = err == nil
			return 0, err
		}
	}
	if _, err := exec.LookPath(other.command() + "-save"); err == nil {
		if changed, err = other.clear(ctx); err != nil {
			return changed, fmt.Errorf("remove the rules that an earlier run made with %s: %w", other.command(), err)
		}
	}
	o.removed = true
	return changed, nil
}

// unused is the flavour that the program of the family is not of: the one that its
// file is named after, else that it says itself, for it may be called anything. Asking
// takes a millisecond of every start. Before 1.8 there was one flavour.
func (f *family) unused(ctx context.Context, program string) (string, error) {
	switch filepath.Base(program) {
	case "xtables-nft-multi":
		return legacyFlavour, nil
	case "xtables-legacy-multi":
		return nftFlavour, nil
	}
	out, err := exec.CommandContext(ctx, f.command(), "--version").Output()
	if err != nil {
		return "", fmt.Errorf("find out the flavour of %s: %w", f.command(), err)
	}
	if strings.Contains(string(out), "(nf_tables)") {
		return legacyFlavour, nil
	}
	return nftFlavour, nil
}
