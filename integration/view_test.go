package integration

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// viewConfig has an overlay with room for five containers in each half of a host.
const viewConfig = `
vtep_subnet: 44.128.0.0/20
vtep_mac_oui: 70:B3:D5:00:00:00
overlays:
  - {name: dcos, subnet: 9.0.0.0/8, prefix: 24}
  - {name: small, subnet: 10.77.0.0/16, prefix: 28, blocks_per_agent: 1}
`

// listed is one container in GET /v1/containers.
type listed struct {
	ID        string
	Overlay   string
	Half      string
	Addresses []string
	AgentIP   string `json:"agent_ip"`
}

func containersOf(t *testing.T, c *lab.Coordinator, query string) (total int, list []listed) {
	t.Helper()
	b, err := c.Get(t.Context(), "/v1/containers?"+query)
	must(t, err)
	var found struct {
		Total      int
		Containers []listed
	}
	must(t, json.Unmarshal(b, &found))
	return found.Total, found.Containers
}

// listedWithin waits until f is satisfied and checks how long that took.
func listedWithin(t *testing.T, what string, limit time.Duration, f func() error) {
	t.Helper()
	began := time.Now()
	must(t, lab.Wait(t.Context(), what, max(limit, 30*time.Second), f))
	took := time.Since(began)
	t.Logf("%s: %s", what, took.Round(time.Millisecond))
	if took > limit {
		t.Errorf("%s: it took %s, want at most %s", what, took, limit)
	}
}

// TestClusterView: containers that real plugins attach are at the coordinator within
// two seconds, and all who tell how full a half is agree to the number.
func TestClusterView(t *testing.T) {
	t.Parallel()
	s := viewSeed(t)
	c := s.Coordinator
	search := func(want int, query string) func() error {
		return func() error {
			if total, list := containersOf(t, c, query); total != want {
				return fmt.Errorf("%d containers, want %d: %+v", total, want, list)
			}
			return nil
		}
	}
	must(t, lab.Wait(t.Context(), "the agents to report", 30*time.Second, func() error {
		if u := usageAt(t, c, s.Agents[0], "docker"); u.Total != 5 {
			return fmt.Errorf("%+v", u)
		}
		return nil
	}))

	web := place(t, s, 0, "web", "dcos", lab.Docker)
	listedWithin(t, "a container of the Docker half is listed", 2*time.Second, search(1, "q="+web.Addr().String()))
	task := place(t, s, 1, "task", "dcos", lab.Mesos)
	listedWithin(t, "a container of the Mesos half is listed", 2*time.Second, search(1, "agent="+s.Agents[1].Underlay().String()))
	if _, list := containersOf(t, c, "overlay=dcos"); len(list) != 2 || list[0].AgentIP == list[1].AgentIP || list[0].Half == list[1].Half {
		t.Errorf("both: %+v", list)
	}
	must(t, task.Del(t.Context()))
	listedWithin(t, "a container that was detached is not", 2*time.Second, search(0, "q="+task.Addr().String()))

	var last *lab.Container
	for _, step := range []struct {
		used  int
		level string
	}{{1, "ok"}, {3, "ok"}, {4, "warning"}, {5, "full"}} {
		for i := usageAt(t, c, s.Agents[0], "docker").Used; i < step.used; i++ {
			last = place(t, s, 0, fmt.Sprint("fill", i), "small", lab.Docker)
		}
		listedWithin(t, fmt.Sprintf("%d of 5 are told", step.used), 2*time.Second, func() error {
			if u := usageAt(t, c, s.Agents[0], "docker"); u.Used != step.used || u.Level != step.level {
				return fmt.Errorf("%+v, want %d used and %s", u, step.used, step.level)
			}
			return nil
		})
		everybodyAgrees(t, s, step.used, step.level)
	}

	// A coordinator that was killed knows everything again.
	c.Kill()
	must(t, last.Del(t.Context()))
	must(t, c.Restart(t.Context()))
	listedWithin(t, "everything is known again", 30*time.Second, func() error {
		if err := search(5, "")(); err != nil {
			return err
		}
		if u := usageAt(t, c, s.Agents[0], "docker"); u.Used != 4 || u.Cooling != 1 {
			return fmt.Errorf("%+v", u)
		}
		return nil
	})
}

func viewSeed(t *testing.T) *lab.Seed {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	s, err := lab.NewSeed(t.Context(), lab.Options{Bin: binDir, CNITool: filepath.Join(binDir, "cnitool"), Secure: true}, viewConfig)
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

// halfUse is one half of one agent in GET /v1/addresses.
type halfUse struct {
	AgentIP string `json:"agent_ip"`
	Half    string
	Level   string

	Total, Used, Cooling, Free int
}

// usageAt is what the coordinator tells of overlay small on a host.
func usageAt(t *testing.T, c *lab.Coordinator, h *lab.Host, half string) halfUse {
	t.Helper()
	b, err := c.Get(t.Context(), "/v1/addresses?overlay=small&agent="+url.QueryEscape(h.Underlay().String()))
	must(t, err)
	var found struct{ Agents []halfUse }
	must(t, json.Unmarshal(b, &found))
	for _, a := range found.Agents {
		if a.Half == half {
			return a
		}
	}
	return halfUse{}
}

// everybodyAgrees compares what API, command line, metrics, doctor, STATUS and ADD
// say of the Docker half of overlay small on the first host, which has room for five.
func everybodyAgrees(t *testing.T, s *lab.Seed, used int, level string) {
	t.Helper()
	h, free := s.Agents[0], 5-used
	has := func(who, text, pattern string) {
		t.Helper()
		if !regexp.MustCompile(pattern).MatchString(text) {
			t.Errorf("%d used: %s does not have %q:\n%s", used, who, pattern, text)
		}
	}
	u := usageAt(t, s.Coordinator, h, "docker")
	if u.Total != 5 || u.Used != used || u.Cooling != 0 || u.Free != free || u.Level != level {
		t.Errorf("the API: %+v", u)
	}
	metrics, err := h.Get(t.Context(), "/metrics")
	must(t, err)
	has("the agent's metrics", string(metrics), fmt.Sprintf(`(?m)^overlay_agent_addresses\{family="ipv4",half="docker",overlay="small",state="used"\} %d$`, used))
	metrics, err = s.Coordinator.Get(t.Context(), "/metrics")
	must(t, err)
	has("the coordinator's metrics", string(metrics), fmt.Sprintf(`(?m)^overlay_coordinator_addresses\{half="docker",overlay="small",state="used"\} %d$`, used))

	show, err := s.Overlayctl(t.Context(), "ipam", "show", "--all", "-o", "wide")
	must(t, err)
	words := map[string]string{"ok": "ok", "warning": "NEARLY FULL", "full": "FULL"}
	has("overlayctl ipam show --all", show, fmt.Sprintf(`(?m)^%s +small +docker +\S+ +%d +0 +%d +5 +%s `, h.Underlay(), used, free, words[level]))
	status, err := h.Run(t.Context(), filepath.Join(s.Bin, "overlayctl"), "status", "--run-dir", h.RunDir)
	must(t, err)
	if level == "ok" {
		if strings.Contains(status, "FULL") {
			t.Errorf("%d used: overlayctl status: %s", used, status)
		}
	} else {
		has("overlayctl status", status, fmt.Sprintf(`(?m)^%s +the docker half of overlay small: %d of 5 used, 0 cooling, %d free$`, words[level], used, free))
	}
	nearly := false
	for _, f := range doctor(t, h) {
		if f.Check == "address-use" {
			nearly = true
			has("doctor", f.Evidence, fmt.Sprintf("%d used, 0 cooling, 5 in all", used))
		}
	}
	if nearly != (level != "ok") {
		t.Errorf("%d used: doctor finds addresses nearly used up: %v", used, nearly)
	}
	verb := cniStatus(t, h, "small")
	if level != "full" {
		if verb != "" {
			t.Errorf("%d used: STATUS: %s", used, verb)
		}
		return
	}
	has("STATUS", verb, fmt.Sprintf(`"code": ?50,.*%d used, 0 cooling, 5 in all`, used))
	_, err = h.Attach(t.Context(), "one-too-many", "small", lab.Docker)
	has("ADD", fmt.Sprint(err), fmt.Sprintf("no address left in the docker half .*: %d used, 0 cooling, 5 in all", used))
}

// cniStatus is what d-overlay says to STATUS, empty where all is well.
func cniStatus(t *testing.T, h *lab.Host, overlay string) string {
	t.Helper()
	cmd := h.Command(t.Context(), filepath.Join(h.Lab.Bin, "d-overlay"))
	cmd.Env = append(os.Environ(), "CNI_COMMAND=STATUS", "CNI_PATH="+h.Lab.Bin)
	cmd.Stdin = strings.NewReader(fmt.Sprintf(`{"cniVersion": "1.1.0", "name": %q, "type": "d-overlay", "runDir": %q}`, overlay, h.RunDir))
	out, err := cmd.Output()
	if _, failed := err.(*exec.ExitError); err != nil && !failed {
		t.Fatal(err)
	}
	return strings.TrimSpace(strings.ReplaceAll(string(out), "\n", " "))
}
