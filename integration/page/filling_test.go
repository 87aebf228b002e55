package page

import (
	"encoding/json"
	"fmt"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"overlayd.internal/overlay/integration/lab"
)

// filling fills a half of one host, step by step, and compares what the page shows
// with what API, command line, metrics and ADD say; that these and STATUS and doctor
// agree with each other is in TestClusterView.
func filling(t *testing.T, s *lab.Seed, v *tab) {
	h := s.Agents[0]
	var all []*lab.Container
	for _, step := range []struct {
		used         int
		level, badge string
	}{{2, "ok", ""}, {4, "warning", "nearly full"}, {5, "full", "full"}} {
		for len(all) < step.used {
			c, err := s.Place(t.Context(), lab.Placement{Agent: 0, Name: fmt.Sprint("fill", len(all)), Overlay: "small", Half: lab.Docker})
			must(t, err)
			all = append(all, c)
		}
		told := fmt.Sprintf("%d used, 0 cooling, %d free", step.used, 5-step.used)
		v.goTo("#/overview")
		// The card is about both hosts together.
		v.wait(fmt.Sprintf("%d of 10 in the card", step.used), fmt.Sprintf(`[...document.querySelectorAll('[data-overlay=small] .fill')].some(e => e.innerText.includes('Docker half') && e.innerText.includes('%d used, 0 cooling, %d free'))`, step.used, 10-step.used))
		v.wait("the tile", fmt.Sprintf("document.querySelector('.tiles').innerText.includes('%d of ')", step.used))
		finding := fmt.Sprintf("[...document.querySelectorAll('.findings li')].find(e => e.innerText.includes('Docker half of small on') && e.innerText.includes('at %s is %s'))", h.Underlay(), map[string]string{"warning": "nearly full", "full": "full: containers are refused"}[step.level])
		if step.level == "ok" {
			v.wait("nothing wrong", "document.querySelector('.fine')")
		} else {
			v.wait("what is wrong, with the number", fmt.Sprintf("(%s)?.innerText.includes('%s of 5')", finding, told))
		}
		id := agreed(t, s, h, step.used, step.level)
		agentShows(t, v, id, told, step.level)
	}
	_, err := h.Attach(t.Context(), "one-too-many", "small", lab.Docker)
	if want := "5 used, 0 cooling, 5 in all"; !strings.Contains(fmt.Sprint(err), want) {
		t.Errorf("ADD to a full half: %v, want %q", err, want)
	}
	for _, c := range all {
		must(t, c.Del(t.Context()))
	}
	v.goTo("#/overview")
	v.wait("that they cool", `[...document.querySelectorAll('[data-overlay=small] .fill')].some(e => e.innerText.includes('0 used, 5 cooling, 5 free'))`)
}

// agreed checks that API, overlayctl and metrics say the numbers that the page shows,
// and returns the id of the agent.
func agreed(t *testing.T, s *lab.Seed, h *lab.Host, used int, level string) string {
	t.Helper()
	b, err := s.Coordinator.Get(t.Context(), "/v1/addresses?overlay=small&agent="+url.QueryEscape(h.Underlay().String()))
	must(t, err)
	var found struct {
		Agents []struct {
			AgentID                    string `json:"agent_id"`
			Half, Level                string
			Total, Used, Cooling, Free int
		}
	}
	must(t, json.Unmarshal(b, &found))
	id := ""
	for _, a := range found.Agents {
		if a.Half != "docker" {
			continue
		}
		id = a.AgentID
		if a.Total != 5 || a.Used != used || a.Cooling != 0 || a.Free != 5-used || a.Level != level {
			t.Errorf("%d used: the API says %+v", used, a)
		}
	}
	show, err := s.Overlayctl(t.Context(), "ipam", "show", "--all", "-o", "wide")
	must(t, err)
	word := map[string]string{"ok": "ok", "warning": "NEARLY FULL", "full": "FULL"}[level]
	metrics, err := s.Coordinator.Get(t.Context(), "/metrics")
	must(t, err)
	for who, m := range map[string][2]string{
		"overlayctl": {show, fmt.Sprintf(`(?m)^%s +small +docker +\S+ +%d +0 +%d +5 +%s `, h.Underlay(), used, 5-used, word)},
		"metrics":    {string(metrics), fmt.Sprintf(`(?m)^overlay_coordinator_addresses\{half="docker",overlay="small",state="used"\} %d$`, used)},
	} {
		if !regexp.MustCompile(m[1]).MatchString(m[0]) {
			t.Errorf("%d used: %s does not say %q:\n%s", used, who, m[1], m[0])
		}
	}
	return id
}

// agentShows compares what the page says about one agent, in the list and in its own
// window.
func agentShows(t *testing.T, v *tab, id, told, level string) {
	t.Helper()
	v.goTo("#/agents?q=" + url.QueryEscape(id))
	v.wait("the agent", "document.querySelectorAll('.vt-spacer button.link').length === 1")
	eval[bool](v, "(document.querySelector('.vt-spacer button.link').click(), true)")
	v.wait("its window with "+told, fmt.Sprintf("[...document.querySelectorAll('dialog .fill')].some(e => e.innerText.includes('small, Docker half') && e.innerText.includes('%s') && e.querySelector('[data-level=%s]'))", told, level))
	eval[bool](v, "(document.querySelector('dialog').close(), true)")
}
