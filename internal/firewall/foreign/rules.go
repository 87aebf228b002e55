// Package foreign finds in the rules of others what stops packets of the overlays:
// policies and rules of iptables, of either flavour, ufw's and Docker's among them,
// and chains of nftables. It asks the rules and changes nothing. The agent says in
// its status what is found, doctor how to mend it.
package foreign

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// patience bounds one program.
const patience = 5 * time.Second

// Rules are those of a host at one moment.
type Rules struct {
	Sets   []Ruleset
	Chains []Chain
	Err    error // why those of nftables could not be read
}

// Ruleset is what one iptables-save prints: a flavour and a family.
type Ruleset struct {
	Command string // to change it: iptables-nft and the like
	Lines   int    // how many rules there are
	policy  map[string]string
	rules   map[string][]string // by table/chain, each as it was printed
}

// Read reads what there is. What is not installed or has no rules is left out.
func Read(ctx context.Context) (r Rules) {
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, flavour := range []string{"nft", "legacy"} {
			if flavour == "legacy" && !loaded(family) {
				continue // asking would load it
			}
			command := family + "-" + flavour
			if text, ok := output(ctx, command+"-save"); ok {
				r.Sets = append(r.Sets, Parse(command, text))
			}
		}
	}
	r.Chains, r.Err = readChains()
	return r
}

// loaded reports whether the legacy flavour of iptables has tables in the
// namespace of the calling thread.
func loaded(family string) bool {
	name := "ip_tables_names"
	if family == "ip6tables" {
		name = "ip6_tables_names"
	}
	b, err := os.ReadFile("/proc/thread-self/net/" + name)
	return err == nil && len(b) > 0
}

func output(ctx context.Context, name string) (text string, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, name)
	cmd.Stdout = &out
	cmd.WaitDelay = time.Second // what the program has started may hold its output
	err := cmd.Run()
	return out.String(), err == nil
}

// Parse reads what command-save printed.
func Parse(command, text string) Ruleset {
	r := Ruleset{Command: command, policy: map[string]string{}, rules: map[string][]string{}}
	table := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
		case strings.HasPrefix(line, ":"):
			if f := strings.Fields(line[1:]); len(f) > 1 {
				r.policy[table+"/"+f[0]] = f[1]
			}
		case strings.HasPrefix(line, "-A "):
			chain, rule, _ := strings.Cut(line[3:], " ")
			r.rules[table+"/"+chain] = append(r.rules[table+"/"+chain], rule)
			r.Lines++
		}
	}
	return r
}

// IPv6 reports whether the rules are about IPv6.
func (r Ruleset) IPv6() bool { return strings.HasPrefix(r.Command, "ip6") }

// has reports whether a chain exists.
func (r Ruleset) has(chain string) bool {
	_, ok := r.policy[chain]
	return ok
}

// ours reports whether a rule jumps to a chain of ours.
func ours(rule string) bool { return strings.Contains(rule, "-j OVERLAY-") }

// drops reports whether a rule drops without asking for more.
func drops(rule string) bool {
	return strings.HasPrefix(rule, "-j DROP") || strings.HasPrefix(rule, "-j REJECT")
}

// dropsAt says what at a hook of the filter table drops whatever reaches it before
// a chain of ours was asked, and how to undo it; or nothing.
func (r Ruleset) dropsAt(hook string) (what, undo string) {
	rules := r.rules["filter/"+hook]
	first := slices.IndexFunc(rules, ours)
	drop := slices.IndexFunc(rules, drops)
	switch {
	case drop >= 0 && (first < 0 || drop < first):
		return hook + " " + rules[drop], fmt.Sprintf("%s --delete %s %s", r.Command, hook, rules[drop])
	case r.policy["filter/"+hook] == "DROP" && first < 0:
		return "the policy of " + hook + " is DROP", fmt.Sprintf("%s --policy %s ACCEPT", r.Command, hook)
	}
	return "", ""
}
