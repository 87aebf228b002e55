package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// finding is one of `overlayctl doctor -o json`.
type finding struct{ Check, Severity, What, Evidence, Fix string }

// doctor runs overlayctl doctor on a host and checks that its exit code fits.
func doctor(t *testing.T, h *lab.Host, args ...string) (found []finding) {
	t.Helper()
	argv := append([]string{filepath.Join(h.Lab.Bin, "overlayctl"), "doctor", "-o", "json", "--run-dir", h.RunDir}, args...)
	cmd := h.Command(t.Context(), argv...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if jerr := json.Unmarshal(out, &found); jerr != nil {
		t.Fatalf("overlayctl doctor: %v, %v\n%s%s", err, jerr, out, stderr.String())
	}
	if (err == nil) != (len(found) == 0) {
		t.Errorf("overlayctl doctor: %v, with %d findings", err, len(found))
	}
	return found
}

// wantFindings checks that doctor names exactly these checks; those in may are
// not judged.
func wantFindings(t *testing.T, h *lab.Host, may []string, want ...string) []finding {
	t.Helper()
	found := doctor(t, h)
	checks := map[string]bool{}
	for _, f := range found {
		checks[f.Check] = true
		if f.What == "" || f.Evidence == "" || f.Fix == "" || f.Severity == "" {
			t.Errorf("finding lacks something: %+v", f)
		}
		if !slices.Contains(want, f.Check) && !slices.Contains(may, f.Check) {
			t.Errorf("doctor finds what is not wrong: %+v", f)
		}
	}
	for _, w := range want {
		if !checks[w] {
			t.Errorf("doctor does not find %s; it finds %+v", w, found)
		}
	}
	return found
}

// healthy waits until doctor is silent.
func healthy(t *testing.T, h *lab.Host) {
	t.Helper()
	var found []finding
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		if found = doctor(t, h); len(found) == 0 {
			return
		}
	}
	t.Fatalf("%s should be healthy: %+v", h.Name, found)
}

func script(t *testing.T, h *lab.Host, lines string) {
	t.Helper()
	_, err := h.Run(t.Context(), "sh", "-ec", lines)
	must(t, err)
}

const doctorConfig = `
vtep_subnet: 44.128.0.0/20
vtep_subnet6: fd01:a::/64
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: dcos, subnet: 9.0.0.0/8, prefix: 24}
  - {name: dcos6, subnet6: "fd01:b::/64", prefix6: 80}
  - {name: small, subnet: 10.77.0.0/16, prefix: 28, blocks_per_agent: 1}
`

// doctorSeed is a lab whose directory of programs has portmap too and can be
// changed.
func doctorSeed(t *testing.T) *lab.Seed {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	bin := t.TempDir()
	for _, p := range []string{"overlayd", "overlayctl", "m-overlay", "d-overlay", "overlay-ipam"} {
		must(t, os.Symlink(filepath.Join(binDir, p), filepath.Join(bin, p)))
	}
	must(t, os.Symlink("/usr/lib/cni/portmap", filepath.Join(bin, "portmap")))
	s, err := lab.NewSeed(t.Context(), lab.Options{Bin: bin, CNITool: filepath.Join(binDir, "cnitool"), Secure: true}, doctorConfig)
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			s.Logs(t.Output(), 20)
		}
		must(t, s.Close())
	})
	must(t, s.Up(t.Context()))
	return s
}

// TestDoctor plants faults in a healthy host: doctor names each of them and
// nothing else, and what it prints cures them.
func TestDoctor(t *testing.T) {
	t.Parallel()
	s := doctorSeed(t)
	h, peer := s.Agents[0], s.Agents[1]
	place(t, s, 0, "a", "dcos", lab.Mesos)
	gone := place(t, s, 0, "b", "dcos", lab.Docker)
	place(t, s, 1, "c", "dcos", lab.Docker)
	other, err := peer.Published()
	must(t, err)
	otherSubnet := other.Overlays[0].Subnet

	for _, h := range s.Hosts() {
		healthy(t, h)
	}
	out, err := h.Run(t.Context(), filepath.Join(h.Lab.Bin, "overlayctl"), "doctor", "--run-dir", h.RunDir)
	if out != "" || err != nil {
		t.Errorf("doctor on a healthy host: %v\n%s", err, out)
	}

	t.Run("what the agent leaves alone", func(t *testing.T) {
		full := []*lab.Container{}
		for _, name := range []string{"s1", "s2", "s3", "s4"} {
			full = append(full, place(t, s, 0, name, "small", lab.Docker))
		}
		before := strings.TrimSuffix(otherSubnet.String(), ".0/24") + ".128/25"
		script(t, h, `
iptables-legacy -w -A INPUT -i lo -j ACCEPT
iptables-legacy -w -A INPUT -p tcp -j ACCEPT
iptables-legacy -w -A INPUT -p icmp -j ACCEPT
iptables-legacy -w -P INPUT DROP
iptables -w -t raw -A PREROUTING -d `+gone.Addr().String()+` ! -i d-dcos -j DROP
nft add table inet firewalld
ip route add `+before+` via 172.17.0.2
`)
		must(t, os.WriteFile(filepath.Join(h.CNIConfDir, "10-other.conflist"), []byte(`{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"bridge"}]}`), 0o644))
		must(t, os.Remove(filepath.Join(h.Lab.Bin, "portmap")))
		must(t, os.Remove(filepath.Join(h.Lab.Bin, "m-overlay")))
		wantFindings(t, h, []string{"overlay"}, "vxlan-input", "iptables-flavours", "docker-options", "firewalld", "route", "cni-order", "portmap", "plugins", "address-use")

		must(t, os.Symlink(filepath.Join(binDir, "m-overlay"), filepath.Join(h.Lab.Bin, "m-overlay")))
		must(t, os.Symlink("/usr/lib/cni/portmap", filepath.Join(h.Lab.Bin, "portmap")))
		must(t, os.Remove(filepath.Join(h.CNIConfDir, "10-other.conflist")))
		script(t, h, `nft delete table inet firewalld; iptables -w -t raw -F PREROUTING; iptables-legacy -w -N ufw-user-input`)
		for _, c := range full {
			must(t, c.Remove(t.Context()))
		}
		// What is printed for the route cures it. Addresses are cooling, and count.
		for _, f := range wantFindings(t, h, []string{"overlay", "address-use", "iptables-flavours"}, "ufw", "route") {
			if f.Check == "route" {
				script(t, h, f.Fix)
			}
		}
		script(t, h, `iptables-legacy -w -X ufw-user-input`)
		// --fix opens the port. The agent looks at rules that make no noise now and then.
		wait(t, "nothing else to be found after --fix", 2*healTime, func() error {
			for _, f := range doctor(t, h, "--fix") {
				if f.Check != "address-use" && f.Check != "iptables-flavours" {
					return fmt.Errorf("after --fix: %+v", f)
				}
			}
			return nil
		})
		script(t, h, `iptables-legacy -w -F; iptables-legacy -w -P INPUT ACCEPT`)
	})

	t.Run("the way", func(t *testing.T) {
		// Something between that neither host knows of.
		script(t, peer, `nft 'add table netdev narrow; add chain netdev narrow in { type filter hook ingress device eth0 priority 0; }; add rule netdev narrow in meta length > 1450 drop'`)
		wantFindings(t, h, []string{"address-use"}, "path-mtu")
		script(t, peer, "nft delete table netdev narrow")
		// The host's own MTU is what the other is told.
		script(t, peer, "ip link set eth0 mtu 1400")
		must(t, lab.Wait(t.Context(), "the MTU of the other host", 30*time.Second, func() error {
			out, err := h.Run(t.Context(), "ip", "route", "show", otherSubnet.String())
			if err == nil && !strings.Contains(out, "mtu 1350") {
				err = fmt.Errorf("the route is %q", out)
			}
			return err
		}))
		wantFindings(t, h, []string{"address-use"})
		script(t, peer, "ip link set eth0 mtu 1500")
	})

	t.Run("what the agent would repair", func(t *testing.T) {
		must(t, h.Proc.Stop())
		must(t, s.Coordinator.Proc.Stop())
		script(t, h, `
ip link set m-dcos down
ip link set d-dcos address 02:00:00:00:00:99
ip link set m-dcos6 type bridge stp_state 1
ip link set d-dcos6 mtu 1400
ip link set vtep1024 mtu 1400
for v in $(ip -br link show type veth | grep -o '^vd[0-9a-f]*'); do ip link set $v nomaster; done
sysctl -q -w net.ipv4.conf.vtep1024.rp_filter=1 net.ipv4.ip_forward=0
ip route delete `+otherSubnet.String()+` dev vtep1024
ip neigh flush dev vtep1024 nud permanent
`)
		may := []string{"address-use", "addresses"}
		wantFindings(t, h, may, "agent", "bridge", "mac-policy", "vtep", "bridge-port", "rp-filter", "forwarding", "route", "neighbour", "coordinator")
		left := map[string]bool{}
		for _, f := range doctor(t, h, "--fix") {
			left[f.Check] = true
		}
		for _, c := range []string{"bridge", "mac-policy", "vtep", "bridge-port", "rp-filter", "forwarding"} {
			if left[c] {
				t.Errorf("--fix did not cure %s", c)
			}
		}

		script(t, h, "ip link delete vtep1024; ip link add vx0 type vxlan id 1024 dstport 64000 dev lo; ip link set vx0 up")
		for _, f := range wantFindings(t, h, may, "agent", "vtep", "vxlan-conflict", "coordinator") {
			if f.Check == "vxlan-conflict" {
				script(t, h, f.Fix)
			}
		}
		must(t, s.Coordinator.Restart(t.Context()))
		must(t, s.StartAgent(h))
		must(t, h.WaitReady(t.Context()))
	})

	t.Run("abandoned", func(t *testing.T) {
		script(t, h, "for v in $(ip -br link show type veth | grep -o '^vd[0-9a-f]*'); do ip link delete $v; done")
		wantFindings(t, h, []string{"address-use"}, "addresses")
	})
}
