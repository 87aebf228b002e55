package page

import (
	"fmt"
	"net/netip"
	"testing"
)

// Who goes by the keyboard stays where he is when what is shown is read again: the
// overview is made anew then.
func TestFocusStays(t *testing.T) {
	c := startCoordinator(t)
	agents := []*agent{{c: c, id: "one", ip: netip.MustParseAddr("172.20.0.1")}, {c: c, id: "two", ip: netip.MustParseAddr("172.20.0.2")}}
	for _, a := range agents {
		must(t, a.register(t.Context()))
		must(t, a.status(t.Context()))
		must(t, a.report(t.Context(), true, nil, nil, a.usage(0)))
	}
	v := open(t, browser(t), 1280, 800)
	v.visit(c.url + "/")
	told := func(n int) string {
		return fmt.Sprintf("document.querySelector('.tiles').innerText.includes('%d not connected')", n)
	}
	// Nobody follows, so that both agents are missed.
	v.wait("both are missed", told(2)+" && document.querySelectorAll('.findings button').length >= 2")
	v.wait("the overlays with their use", "document.querySelector('.cards a[href^=\"#/containers\"]')")
	for _, selector := range []string{".tiles a[href='#/agents']", ".cards a[href^='#/containers']", ".findings button"} {
		eval[bool](v, "document.querySelector("+js(selector)+").focus(), true")
		if selector == ".findings button" {
			defer agents[1].follow(t)()
			v.wait("one is missed", told(1))
		} else {
			eval[bool](v, "window.was = document.activeElement, document.dispatchEvent(new Event('visibilitychange')), true")
			v.wait("it is made anew", "!window.was.isConnected")
		}
		if !eval[bool](v, "document.activeElement.matches("+js(selector)+")") {
			t.Errorf("%s has lost the focus to %s", selector, eval[string](v, "document.activeElement.outerHTML.slice(0, 200)"))
		}
	}
}
