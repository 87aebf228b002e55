// Port-mapper does what mesos-cni-port-mapper of Apache Mesos does: it runs
// another CNI plugin, its delegate, and forwards host ports to the IPv4 address
// that one reports. It is written after src/slave/containerizer/mesos/isolators/network/cni/plugins/port_mapper.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"overlayd.internal/overlay/integration/lab/ucr"
)

// The codes of its errors.
const (
	codeRead        = 100
	codeBadArgs     = 101
	codeDelegate    = 102
	codePortMap     = 103
	codeUnsupported = 104
)

type failure struct {
	code int
	msg  string
}

func (f failure) Error() string { return f.msg }

func failf(code int, format string, args ...any) error {
	return failure{code, fmt.Sprintf(format, args...)}
}

func main() {
	out, err := run()
	if err == nil {
		os.Stdout.Write(out)
		return
	}
	f, ok := err.(failure)
	if !ok {
		f = failure{codePortMap, err.Error()}
	}
	json.NewEncoder(os.Stdout).Encode(map[string]any{"cniVersion": "0.3.0", "code": f.code, "msg": f.msg})
	os.Exit(1)
}

// config is what it reads of its standard input.
type config struct {
	Name           string
	Chain          string
	ExcludeDevices []string
	Delegate       map[string]any
	Args           map[string]json.RawMessage
}

func run() ([]byte, error) {
	stdin, err := io.ReadAll(os.Stdin)
	if err != nil {
		return nil, failf(codeRead, "%v", err)
	}
	var c config
	if err := json.Unmarshal(stdin, &c); err != nil {
		return nil, failf(codeRead, "%v", err)
	}
	plugin, _ := c.Delegate["type"].(string)
	if c.Name == "" || c.Chain == "" || plugin == "" {
		return nil, failf(codeBadArgs, "'name', 'chain' and 'delegate.type' are required")
	}
	for _, v := range []string{"CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH", "CNI_NETNS"} {
		if os.Getenv(v) == "" && (v != "CNI_NETNS" || os.Getenv("CNI_COMMAND") != "DEL") {
			return nil, failf(codeBadArgs, "unable to find environment variable '%s'", v)
		}
	}
	switch command := os.Getenv("CNI_COMMAND"); command {
	case "ADD":
		return c.add(plugin)
	case "DEL":
		if err := c.delRules(); err != nil {
			return nil, err
		}
		_, err := c.delegate(plugin)
		return nil, err
	default:
		return nil, failf(codeUnsupported, "unsupported command: %s", command)
	}
}

// delegate runs the delegate: its own object, with name and args replaced and
// nothing else added.
func (c config) delegate(plugin string) ([]byte, error) {
	conf := c.Delegate
	conf["name"], conf["args"] = c.Name, c.Args
	stdin, err := json.Marshal(conf)
	if err != nil {
		return nil, failf(codeBadArgs, "%v", err)
	}
	for _, dir := range strings.Split(os.Getenv("CNI_PATH"), ":") {
		path := filepath.Join(dir, plugin)
		if fi, err := os.Stat(path); err != nil || fi.Mode()&0o111 == 0 {
			continue
		}
		cmd := exec.Command(path)
		cmd.Stdin = bytes.NewReader(stdin)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil {
			return nil, failf(codeDelegate, "delegate %s: %v: stdout='%s', stderr='%s'", plugin, err, stdout.String(), stderr.String())
		}
		return stdout.Bytes(), nil
	}
	return nil, failf(codeDelegate, "cannot find the delegate plugin '%s'", plugin)
}

func (c config) add(plugin string) ([]byte, error) {
	out, err := c.delegate(plugin)
	if err != nil {
		return nil, err
	}
	result, err := ucr.ParseResult(out)
	if err != nil {
		return nil, failf(codeDelegate, "could not parse the delegate's result: %v", err)
	}
	if result.IP4 == nil {
		return nil, failf(codeDelegate, "delegate CNI plugin '%s' did not return an IPv4 address", plugin)
	}
	if err := c.addRules(result.IP4.Prefix().Addr().String()); err != nil {
		return nil, err
	}
	var keep map[string]json.RawMessage
	if err := json.Unmarshal(out, &keep); err != nil {
		return nil, failf(codeDelegate, "%v", err)
	}
	for k := range keep {
		if k != "ip4" && k != "ip6" && k != "dns" {
			delete(keep, k)
		}
	}
	return json.Marshal(keep)
}

func (c config) addRules(ip string) error {
	var mesos struct {
		NetworkInfo struct {
			PortMappings []struct {
				HostPort      int    `json:"host_port"`
				ContainerPort int    `json:"container_port"`
				Protocol      string `json:"protocol"`
			} `json:"port_mappings"`
		} `json:"network_info"`
	}
	if raw, ok := c.Args["org.apache.mesos"]; ok {
		if err := json.Unmarshal(raw, &mesos); err != nil {
			return failf(codeBadArgs, "%v", err)
		}
	}
	if len(mesos.NetworkInfo.PortMappings) == 0 {
		return nil
	}
	exclude := ""
	for _, d := range c.ExcludeDevices { // the last one wins, as in Mesos
		exclude = "! -i " + d
	}
	script := fmt.Sprintf(`set -e
		iptables -w -n -t nat --list %[1]s >/dev/null 2>&1 || {
			iptables -w -t nat -N %[1]s
			iptables -w -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j %[1]s
			iptables -w -t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j %[1]s
		}
	`, c.Chain)
	for _, m := range mesos.NetworkInfo.PortMappings {
		protocol := strings.ToLower(m.Protocol)
		if protocol == "" {
			protocol = "tcp"
		}
		rule := fmt.Sprintf("%s %s -p %s -m %s --dport %d -j DNAT --to-destination %s:%d -m comment --comment 'container_id: %s'",
			c.Chain, exclude, protocol, protocol, m.HostPort, ip, m.ContainerPort, os.Getenv("CNI_CONTAINERID"))
		script += fmt.Sprintf("iptables -w -t nat -C %s 2>/dev/null || iptables -w -t nat -A %s\n", rule, rule)
	}
	return shell(script)
}

func (c config) delRules() error {
	return shell(fmt.Sprintf(`iptables -w -t nat -S %s | sed -n '/container_id: %s/ s/-A/iptables -w -t nat -D/p' | sh`, c.Chain, os.Getenv("CNI_CONTAINERID")))
}

func shell(script string) error {
	if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
		return failf(codePortMap, "%v: %s", err, out)
	}
	return nil
}
