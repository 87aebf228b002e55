package teardown

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/internal/firewall/nftables"
)

// BeforeFile is where the state directory keeps what the host had before the
// first start of an agent in this boot.
const BeforeFile = "before.json"

const (
	procSys = "/proc/sys/"
	maxFile = 1 << 20
)

// hostSysctls are those of the host that an agent changes, as patterns below
// /proc/sys, in the order in which they are put back: the first two change the
// others of their family. Those of our own devices go with them.
var hostSysctls = []string{
	"net/ipv4/ip_forward",
	"net/ipv6/conf/all/forwarding",
	"net/ipv4/conf/*/forwarding",
	"net/ipv6/conf/*/forwarding",
	"net/ipv6/conf/*/accept_ra",
}

// before is the file. In another boot the kernel begins anew.
type before struct {
	BootID  string            `json:"boot_id"`
	Sysctls map[string]string `json:"sysctls"` // by path below /proc/sys
	// Chains are the tables and base chains of iptables in nftables; nil where
	// there is no nftables.
	Chains []string `json:"chains"`
}

// Remember stores what the host has that teardown puts back, unless that was
// done in this boot. It is called before an agent changes anything.
func Remember(stateDir, bootID string) error {
	path := filepath.Join(stateDir, BeforeFile)
	if s, err := readBefore(path); err == nil && s.BootID == bootID {
		return nil
	}
	s := before{BootID: bootID, Sysctls: map[string]string{}}
	if chains, err := nftables.Standard(); err == nil {
		s.Chains = append([]string{}, chains...)
	}
	for _, pattern := range hostSysctls {
		paths, err := filepath.Glob(procSys + pattern)
		if err != nil {
			return err
		}
		for _, p := range paths {
			if v, err := readValue(p); err == nil { // the link may go meanwhile
				s.Sysctls[strings.TrimPrefix(p, procSys)] = v
			}
		}
	}
	return conf.WriteJSON(path, s, 0o600)
}

// Restore puts the host's sysctls back, takes away what iptables made and has
// nothing in it, and reports how many of both there were. Links that came since
// keep their sysctls, but for what the kernel itself sets on all of them.
func Restore(stateDir, bootID string) (changed int, err error) {
	s, err := readBefore(filepath.Join(stateDir, BeforeFile))
	if errors.Is(err, fs.ErrNotExist) || err == nil && s.BootID != bootID {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("put back what was before: %w", err)
	}
	var errs []error
	if s.Chains != nil {
		n, err := nftables.RemoveStandard(s.Chains)
		changed += n
		errs = append(errs, err)
	}
	for _, pattern := range hostSysctls {
		var keys []string
		for key := range s.Sysctls {
			if ok, _ := filepath.Match(pattern, key); ok && filepath.IsLocal(key) {
				keys = append(keys, key)
			}
		}
		slices.Sort(keys)
		for _, key := range keys {
			now, err := readValue(procSys + key)
			if err != nil || now == s.Sysctls[key] {
				continue // it went with its link
			}
			if err := os.WriteFile(procSys+key, []byte(s.Sysctls[key]), 0); err != nil {
				errs = append(errs, fmt.Errorf("put back sysctl %s: %w", key, err))
				continue
			}
			changed++
		}
	}
	return changed, errors.Join(errs...)
}

func readBefore(path string) (s before, err error) {
	b, err := conf.ReadRegular(path, maxFile)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("read %s: %w", path, err)
	}
	return s, nil
}

func readValue(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.TrimSpace(string(b)), err
}
