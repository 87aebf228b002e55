package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/integration/lab"
)

// seriesIn are the names of our series in an expression.
var seriesIn = regexp.MustCompile(`\boverlay_(?:agent|coordinator|build)_[a-z0-9_]+`)

// expressions are those of the alerts and of the dashboard.
func expressions(t *testing.T) (all []string) {
	t.Helper()
	rules, err := os.ReadFile(filepath.Join(top, "conf/examples/prometheus/alerts.yml"))
	must(t, err)
	for _, m := range regexp.MustCompile(`(?m)^ +expr: (.+)$`).FindAllStringSubmatch(string(rules), -1) {
		all = append(all, m[1])
	}
	alerts := len(all)
	board, err := os.ReadFile(filepath.Join(top, "conf/examples/grafana/overlay.json"))
	must(t, err)
	var d struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	must(t, json.Unmarshal(board, &d))
	for _, p := range d.Panels {
		for _, q := range p.Targets {
			all = append(all, q.Expr)
		}
	}
	if alerts < 15 || len(all) < alerts+15 {
		t.Fatalf("%d alerts and %d queries; has the form of the files changed?", alerts, len(all)-alerts)
	}
	return all
}

// TestAlertRules: the rules fire when they should, and are silent when all is well.
func TestAlertRules(t *testing.T) {
	dir := filepath.Join(top, "conf/examples/prometheus")
	for _, args := range [][]string{{"check", "rules", "alerts.yml"}, {"test", "rules", "alerts_test.yml"}} {
		cmd := exec.CommandContext(t.Context(), "promtool", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	// Every alert has a test in which it fires.
	rules, err := os.ReadFile(filepath.Join(dir, "alerts.yml"))
	must(t, err)
	tests, err := os.ReadFile(filepath.Join(dir, "alerts_test.yml"))
	must(t, err)
	for _, m := range regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(string(rules), -1) {
		if !regexp.MustCompile(`alertname[=:] ?"?` + m[1] + `\b`).Match(tests) {
			t.Errorf("alerts_test.yml has nothing of %s", m[1])
		}
	}
	// Alerts and doctor agree on what is nearly full.
	source, err := os.ReadFile(filepath.Join(top, "overlayd/internal/api/view.go"))
	must(t, err)
	m := regexp.MustCompile(`const NearlyFull = (\d+)`).FindSubmatch(source)
	if m == nil || !strings.Contains(string(rules), fmt.Sprintf(`sum without (state) (overlay_agent_addresses) >= 0.%s`, strings.TrimRight(string(m[1]), "0"))) {
		t.Errorf("OverlayHalfNearlyFull has another threshold than doctor: %s", m)
	}
}

// TestPrometheus: a real Prometheus scrapes a coordinator and an agent, with the
// certificate of a reader, as conf/examples says. The metrics are clean, every series that alerts and
// dashboard name exists, and every expression has an answer.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	s := upSeed(t, seedConfig(t))
	h, ctx := s.Agents[0], t.Context()
	must(t, h.Proc.Stop())
	must(t, h.StartAgent(s.Coordinator.URL, "--listen", "127.0.0.1:6441"))
	must(t, h.WaitReady(ctx))
	place(t, s, 0, "a", "dcos", lab.Docker)

	dir := t.TempDir()
	token, err := s.Overlayctl(ctx, "token", "create", "--role", "reader")
	must(t, err)
	login := h.Command(ctx, filepath.Join(binDir, "overlayctl"), "login", "--coordinator", s.Coordinator.URL, "--token", strings.TrimSpace(token))
	login.Env = append(os.Environ(), "HOME="+dir)
	if out, err := login.CombinedOutput(); err != nil {
		t.Fatalf("log in: %v\n%s", err, out)
	}
	example, err := os.ReadFile(filepath.Join(top, "conf/examples/prometheus/prometheus.yml"))
	must(t, err)
	rules, err := filepath.Abs(filepath.Join(top, "conf/examples/prometheus/alerts.yml"))
	must(t, err)
	config := strings.NewReplacer("/etc/prometheus/overlay/", dir+"/.config/overlay/", "10.10.0.120:6440", "172.17.0.2:6440", "[alerts.yml]", "["+rules+"]").Replace(string(example))
	config = "global: {scrape_interval: 1s, evaluation_interval: 1s}\n" + config
	file := filepath.Join(dir, "prometheus.yml")
	must(t, os.WriteFile(file, []byte(config), 0o600))
	_, err = s.Start(h.Netns, "prometheus", "prometheus", "--config.file="+file, "--storage.tsdb.path="+dir+"/data", "--web.listen-address=127.0.0.1:9090")
	must(t, err)

	ask := func(path string, v any) error {
		b, err := h.Netns.Get(ctx, "http://127.0.0.1:9090/api/v1/"+path)
		if err != nil {
			return err
		}
		return json.Unmarshal(b, v)
	}
	var names struct{ Data []string }
	must(t, lab.Wait(ctx, "Prometheus to have scraped both", 60*time.Second, func() error {
		var targets struct {
			Data struct {
				ActiveTargets []struct{ Health, LastError, ScrapeURL string }
			}
		}
		if err := ask("targets", &targets); err != nil {
			return err
		}
		for _, a := range targets.Data.ActiveTargets {
			if a.Health != "up" {
				return fmt.Errorf("%s: %s %s", a.ScrapeURL, a.Health, a.LastError)
			}
		}
		if len(targets.Data.ActiveTargets) != 2 {
			return fmt.Errorf("%d targets", len(targets.Data.ActiveTargets))
		}
		return ask("label/__name__/values", &names)
	}))
	series := map[string]bool{}
	for _, n := range names.Data {
		series[n] = true
	}
	for _, e := range expressions(t) {
		for _, name := range seriesIn.FindAllString(e, -1) {
			if !series[name] {
				t.Errorf("%s is no series of agent or coordinator, in: %s", name, e)
			}
		}
		out, err := exec.CommandContext(ctx, "ip", "netns", "exec", h.Netns.Name, "promtool", "query", "instant", "http://127.0.0.1:9090", e).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", e, err, out)
		}
	}
	var groups struct {
		Data struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError string }
			}
		}
	}
	must(t, lab.Wait(ctx, "all rules to be evaluated", 30*time.Second, func() error {
		must(t, ask("rules", &groups))
		n := 0
		for _, g := range groups.Data.Groups {
			for _, r := range g.Rules {
				if n++; r.Health != "ok" {
					return fmt.Errorf("%s: %s %s", r.Name, r.Health, r.LastError)
				}
			}
		}
		if n < 15 {
			return fmt.Errorf("%d rules", n)
		}
		return nil
	}))

	for _, page := range []func() ([]byte, error){
		func() ([]byte, error) { return s.Coordinator.Get(ctx, "/metrics") },
		func() ([]byte, error) { return h.Get(ctx, "/metrics") },
	} {
		b, err := page()
		must(t, err)
		check := exec.CommandContext(ctx, "promtool", "check", "metrics")
		check.Stdin = strings.NewReader(string(b))
		if out, err := check.CombinedOutput(); err != nil || len(strings.TrimSpace(string(out))) > 0 {
			t.Errorf("promtool check metrics: %v\n%s", err, out)
		}
	}
	// What there is and nobody looks at is a question to ask when one is added.
	var unused []string
	text := strings.Join(expressions(t), "\n")
	for n := range series {
		if strings.HasPrefix(n, "overlay_") && !strings.Contains(text, strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(n, "_sum"), "_count"), "_bucket")) {
			unused = append(unused, n)
		}
	}
	slices.Sort(unused)
	t.Logf("neither in an alert nor on the dashboard: %v", unused)
}
