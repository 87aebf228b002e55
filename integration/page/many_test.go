package page

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"image/png"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"golang.org/x/sync/errgroup"
)

const (
	manyAgents     = 2000
	manyContainers = 50 // of each, more or less
)

// measuring notes long tasks, and when the first numbers were seen.
const measuring = `
window.long = [];
new PerformanceObserver(list => { for (const e of list.getEntries()) window.long.push(Math.round(e.duration)) }).observe({type: 'longtask', buffered: true});
window.firstContent = 0;
new MutationObserver(() => {
  if (!window.firstContent && document.querySelector('.tiles strong')) window.firstContent = performance.now();
}).observe(document, {childList: true, subtree: true});
window.until = async (f, ms = 5000) => {
  const end = performance.now() + ms;
  while (!f()) {
    if (performance.now() > end) throw new Error('not within ' + ms + ' ms: ' + f);
    await new Promise(r => { const c = new MessageChannel(); c.port1.onmessage = r; c.port2.postMessage(0) });
  }
};
`

func (b *tab) measure() {
	b.t.Helper()
	_, err := chromedp.Call(b.ctx, page.AddScriptToEvaluateOnNewDocument, page.AddScriptToEvaluateOnNewDocumentParams{Source: measuring})
	must(b.t, err)
}

// TestMany: 2,000 agents and some 100,000 containers, at a real coordinator.
func TestMany(t *testing.T) {
	br := browser(t)
	began := time.Now()
	c := startCoordinator(t)
	agents := c.join(manyAgents, manyContainers)
	t.Logf("%d agents have joined and reported after %s", len(agents), time.Since(began).Round(time.Millisecond))

	t.Run("first content", func(t *testing.T) { firstContent(t, br, c) })
	t.Run("search", func(t *testing.T) { search(t, br, c) })
	t.Run("hostile names", func(t *testing.T) { hostileNames(t, br, c) })
	t.Run("scroll", func(t *testing.T) { scroll(t, br, c) })
	t.Run("live", func(t *testing.T) { live(t, br, c, agents[1]) })
	t.Run("keyboard", func(t *testing.T) { keyboard(t, br, c) })
	t.Run("accessible", func(t *testing.T) { accessible(t, br, c) })
	t.Run("pictures", func(t *testing.T) { pictures(t, br, c) })
	t.Run("100 events a second", func(t *testing.T) { manyEvents(t, br, c, agents) })
}

func firstContent(t *testing.T, br context.Context, c *coordinator) {
	var took []float64
	for range 3 {
		b := open(t, br, 1280, 800)
		b.measure()
		b.visit(c.url + "/")
		b.wait("the first numbers", "window.firstContent")
		took = append(took, eval[float64](b, "window.firstContent"))
		b.wait("all connected agents", fmt.Sprintf("document.querySelector('.tiles').innerText.includes('%s')", "2,000"))
	}
	t.Logf("first content after %.0f ms", took)
	if slices.Min(took) > 2000 {
		t.Errorf("first content after %.0f ms, want less than 2000", took)
	}
	b := open(t, br, 1280, 800)
	b.visit(c.url + "/")
	b.wait("the overlays", "document.querySelectorAll('.card').length == 3")
	b.wait("agents and addresses", "document.querySelector('.tiles')?.innerText.includes('not connected') && document.querySelector('main').innerText.includes('Mesos half')")
	text := b.text("main")
	for _, want := range []string{"2,000", "4 not connected", "What is wrong", "host-0400 at 172.20.1.151 is not connected", "bridge m-dcos is there and not ours", "docker does not answer",
		"9.0.0.0/8", "2,000 of 65,536 subnets /24", "10.64.0.0/12", "fd01:b::/64", "Mesos half"} {
		if !strings.Contains(text, want) {
			t.Errorf("the overview lacks %q:\n%.4000s", want, text)
		}
	}
}

func search(t *testing.T, br context.Context, c *coordinator) {
	b := open(t, br, 1280, 800)
	b.measure()
	b.visit(c.url + "/#/containers")
	b.wait("the containers", "document.querySelectorAll('.vt-spacer .vt-row').length > 10 && document.querySelector('.count').innerText.includes(',')")
	total := b.text(".count")
	for _, q := range []string{"web-1999-", "9.0.7.13", "db-7-1", "dcos", "worker-100", "0009e37", "nothing-like-that"} {
		var took []float64
		for range 5 {
			took = append(took, eval[float64](b, fmt.Sprintf(`(async () => {
				const q = document.querySelector('#containers-q'), count = document.querySelector('.count'), set = v => { q.value = v; q.dispatchEvent(new Event('input', {bubbles: true})) };
				set('x y z'); await until(() => count.innerText === '0 containers');
				await new Promise(r => setTimeout(r, 120));
				const began = performance.now();
				set(%s);
				const shown = () => { const r = [...document.querySelectorAll('.vt-spacer .vt-row')]; return r.length > 0 && r.every(x => !x.innerText.startsWith('...')) };
				if (%t) await until(() => count.innerText !== '0 containers' && shown());
				else await until(() => performance.getEntriesByType('resource').some(e => e.startTime >= began - 1 && e.responseEnd > 0 && e.name.includes('q=nothing')));
				return performance.now() - began;
			})()`, js(q), q != "nothing-like-that")))
		}
		rows := eval[int](b, "document.querySelectorAll('.vt-spacer .vt-row').length")
		t.Logf("%-18q %-18s after %5.0f ms, %d rows in the document", q, b.text(".count"), took, rows)
		if slices.Min(took) > 100 {
			t.Errorf("%q took %.0f ms, want less than 100", q, took)
		}
		if rows > 60 {
			t.Errorf("%d rows are in the document", rows)
		}
	}
	b.fill("#containers-q", "9.0.7.13")
	b.wait("the container with an address", "[...document.querySelectorAll('.vt-spacer .c-addresses')].length > 0 && [...document.querySelectorAll('.vt-spacer .c-addresses')].every(e => e.innerText.startsWith('9.0.7.13'))")
	b.fill("#containers-q", "")
	b.fill("#containers-agent", "host-0007")
	b.wait("those of one agent", "[...document.querySelectorAll('.vt-spacer .c-agent')].length > 5 && [...document.querySelectorAll('.vt-spacer .c-agent')].every(e => e.innerText == '172.20.0.8')")
	b.fill("#containers-agent", "")
	b.wait("all again", fmt.Sprintf("document.querySelector('.count').innerText === %s", js(total)))
	if hash := eval[string](b, "location.hash"); hash != "#/containers" {
		t.Errorf("the address is %s", hash)
	}
}

func hostileNames(t *testing.T, br context.Context, c *coordinator) {
	b := open(t, br, 1280, 2600)
	b.visit(c.url + "/#/containers?agent=host-0000")
	b.wait("the containers", "document.querySelectorAll('.vt-spacer .name').length === 50")
	names := eval[[]string](b, "[...document.querySelectorAll('.vt-spacer .name')].map(e => e.textContent)")
	for _, want := range hostile {
		want = strings.NewReplacer("\u202e", "", "\n", "").Replace(want) // the coordinator keeps what prints
		if !slices.Contains(names, want) {
			t.Errorf("%q is not shown as it is: %q", want, names)
		}
	}
	b.visit(c.url + "/#/map?overlay=dcos&at=9.0.0.0%2F25")
	for _, hash := range []string{"#/map", "#/events", "#/overview"} {
		eval[bool](b, fmt.Sprintf("(location.hash = %s, true)", js(hash)))
		b.wait(hash, "document.querySelector('main').innerText.length > 20")
	}
	if n := eval[int](b, "document.querySelectorAll('main img, main script, main svg').length"); n != 0 {
		t.Errorf("%d elements were made of names", n)
	}
	if eval[bool](b, "'pwned' in window") {
		t.Error("a name was run")
	}
}

// scroll goes to the end of the list, and back, and looks at what is there.
func scroll(t *testing.T, br context.Context, c *coordinator) {
	b := open(t, br, 1280, 800)
	b.measure()
	b.visit(c.url + "/#/containers")
	b.wait("the containers", "document.querySelectorAll('.vt-spacer .name').length > 10")
	rows := eval[int](b, "Number(document.querySelector('.vt').getAttribute('aria-rowcount'))")
	if rows < 90_000 {
		t.Errorf("aria-rowcount is %d", rows)
	}
	eval[bool](b, "(window.long.length = 0, true)")
	for _, to := range []float64{0.1, 0.5, 1, 0} {
		began := time.Now()
		eval[bool](b, fmt.Sprintf("(() => { const v = document.querySelector('.vt-body'); v.scrollTop = v.scrollHeight * %f; return true })()", to))
		b.wait("rows at the place", fmt.Sprintf(`(() => {
			const v = document.querySelector('.vt-body'), r = [...v.querySelectorAll('[data-index]')];
			const at = r.find(e => Number(e.dataset.index) === Math.min(%d, Math.ceil(v.scrollTop / 40)));
			return at && at.querySelector('.name') && Math.abs(v.scrollTop - Math.min(v.scrollHeight * %f, v.scrollHeight - v.clientHeight)) < 2;
		})()`, rows-2, to))
		t.Logf("rows at %3.0f %% of the list after %s", 100*to, time.Since(began).Round(time.Millisecond))
	}
	t.Logf("long tasks while scrolling (ms): %v", eval[[]int](b, "window.long"))
	index := eval[[]int](b, "[...document.querySelectorAll('.vt-spacer .vt-row')].map(e => Number(e.getAttribute('aria-rowindex')))")
	if !slices.IsSorted(index) || index[0] != 2 {
		t.Errorf("the rows are in the order %v", index)
	}
}

// live: a container appears, and goes.
func live(t *testing.T, br context.Context, c *coordinator, a *agent) {
	b := open(t, br, 1280, 800)
	b.visit(c.url + "/#/containers?q=just-now")
	b.wait("the stream", "document.querySelector('#live').dataset.live === 'on'")
	b.wait("nothing yet", "document.querySelector('.vt-none') && document.querySelector('.vt-none').innerText === 'No container matches.'")
	x := a.attachment(60, "just-now")
	began := time.Now()
	must(t, a.report(t.Context(), false, []object{x}, nil, nil))
	b.wait("the container", "[...document.querySelectorAll('.vt-spacer .name')].some(e => e.textContent === 'just-now')")
	t.Logf("a container was seen after %s", time.Since(began).Round(time.Millisecond))
	eval[bool](b, "(location.hash = '#/events', true)")
	b.wait("the event", "document.querySelector('main').innerText.includes('container just-now') && document.querySelector('main').innerText.includes('container attached')")
	eval[bool](b, "(location.hash = '#/containers?q=just-now', true)")
	b.wait("the container again", "document.querySelectorAll('.vt-spacer .name').length === 1")
	must(t, a.report(t.Context(), false, nil, []string{key(x)}, nil))
	b.wait("that it has gone", "document.querySelector('.vt-none').innerText === 'No container matches.' && !document.querySelector('.vt-none').hidden")
}

// key is how an agent names an attachment that has gone: the overlay, and the first
// half of the sha256 of network, container and interface, each behind its length.
func key(x object) string {
	var b []byte
	for _, k := range []string{"network", "id", "ifname"} {
		s := x[k].(string)
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
	}
	sum := sha256.Sum256(b)
	return x["overlay"].(string) + "/" + hex.EncodeToString(sum[:16])
}

func keyboard(t *testing.T, br context.Context, c *coordinator) {
	b := open(t, br, 1280, 800)
	b.media("prefers-reduced-motion:reduce")
	b.visit(c.url + "/#/agents")
	b.wait("the agents", "document.querySelectorAll('.vt-spacer .vt-row').length > 5")
	focused := func() string {
		return eval[string](b, "document.activeElement.className + ' ' + document.activeElement.textContent.slice(0, 40)")
	}
	b.key(kb.Tab)
	if f := focused(); !strings.Contains(f, "Skip to the content") {
		t.Errorf("the first stop is %q", f)
	}
	eval[bool](b, "(document.querySelector('.vt-body').focus(), true)")
	b.key(kb.ArrowDown)
	first := focused()
	b.key(kb.ArrowDown)
	second := focused()
	if !strings.Contains(first, "host-") || !strings.Contains(second, "host-") || first == second {
		t.Errorf("the arrow keys lead to %q and %q", first, second)
	}
	b.key(kb.End)
	b.wait("the last row", "document.activeElement.closest('[data-index]')?.dataset.index === '1999'")
	b.key(kb.Enter)
	b.wait("the dialog", "document.querySelector('dialog[open]')")
	if text := b.text("dialog"); !strings.Contains(text, "VTEP") || !strings.Contains(text, "put back") || !strings.Contains(text, "1450") {
		t.Errorf("the dialog has %q", text)
	}
	b.key(kb.Escape)
	b.wait("the dialog gone", "!document.querySelector('dialog')")
	if f := focused(); !strings.Contains(f, "host-") {
		t.Errorf("after the dialog the focus is on %q", f)
	}

	b.visit(c.url + "/#/map?overlay=dcos")
	b.wait("the map", "document.querySelector('.crumbs').innerText.includes('9.0.0.0/8') && document.querySelectorAll('.map-table tr').length > 2")
	eval[bool](b, "(document.querySelector('canvas').focus(), true)")
	b.wait("the first part", "document.querySelector('.told').innerText.startsWith('9.0.0.0/16')")
	b.key(kb.ArrowRight)
	b.wait("the second part", "document.querySelector('.told').innerText.startsWith('9.1.0.0/16')")
	b.wait("that it is said", "document.querySelector('#said').textContent.startsWith('9.1.0.0/16: 256 agents')")
	for _, want := range []string{"9.1.0.0/16", "9.1.0.0/24", "9.1.0.0/25"} {
		b.key(kb.Enter)
		b.wait(want, fmt.Sprintf("document.querySelector('.crumbs').innerText.includes(%s)", js(want)))
	}
	b.wait("the containers of the half", "document.querySelector('.map-table').innerText.includes('9.1.0.2')")
	for range 3 {
		b.key(kb.Escape)
	}
	b.wait("the whole again", "!document.querySelector('.crumbs').innerText.includes('9.1.0.0/16')")
}

// views are all there are, each with what shows that it is complete.
var views = []struct{ name, hash, ready string }{
	{"overview", "#/overview", "document.querySelectorAll('.card').length === 3 && document.querySelector('.findings')"},
	{"agents", "#/agents", "document.querySelectorAll('.vt-spacer .vt-row').length > 3"},
	{"containers", "#/containers", "document.querySelectorAll('.vt-spacer .name').length > 3"},
	{"map", "#/map?overlay=dcos", "document.querySelectorAll('.map-table tr').length > 2"},
	{"block", "#/map?overlay=dcos&at=9.0.3.0%2F24", "document.querySelectorAll('.map-table tr').length === 3"},
	{"half", "#/map?overlay=dcos&at=9.0.3.0%2F25", "document.querySelectorAll('.map-table tr').length > 5"},
	{"events", "#/events", "document.querySelectorAll('.vt-spacer .vt-row').length > 0"},
}

func accessible(t *testing.T, br context.Context, c *coordinator) {
	for _, as := range []struct {
		theme         string
		width, height int64
		rules         []string // none: all
	}{{"light", 1280, 800, nil}, {"dark", 1280, 800, []string{"color-contrast"}}, {"light", 360, 740, nil}} {
		b := open(t, br, as.width, as.height)
		b.media("prefers-color-scheme:"+as.theme, "prefers-reduced-motion:reduce")
		b.visit(c.url + "/")
		for _, v := range views {
			what := fmt.Sprintf("%s, %s, %d", v.name, as.theme, as.width)
			eval[bool](b, fmt.Sprintf("(location.hash = %s, true)", js(v.hash)))
			b.wait(what, v.ready)
			b.accessible(what, as.rules...)
			if wide := eval[int64](b, "document.documentElement.scrollWidth"); wide > as.width {
				t.Errorf("%s: it is %d wide", what, wide)
			}
		}
		eval[bool](b, "(location.hash = '#/agents', true)")
		b.wait("agents", views[1].ready)
		eval[bool](b, "(document.querySelector('.vt-spacer button').click(), true)")
		b.wait("the dialog", "document.querySelector('dialog[open]')")
		b.accessible("dialog, " + as.theme)
	}
}

// pictures are those of the documents. They are written there where
// OVERLAY_PAGE_PICTURES names the directory.
func pictures(t *testing.T, br context.Context, c *coordinator) {
	dir := os.Getenv("OVERLAY_PAGE_PICTURES")
	if dir == "" {
		dir = t.TempDir()
	} else if !filepath.IsAbs(dir) {
		dir = filepath.Join(top, dir)
	}
	for _, p := range []struct {
		name, theme   string
		view          int
		width, height int64
		hash          string
	}{{"light", "light", 0, 1100, 760, "#/overview"}, {"dark", "dark", 2, 1100, 600, "#/containers?q=db-19"}, {"narrow", "light", 1, 360, 740, "#/agents"},
		{"map", "light", 3, 1100, 800, "#/map?overlay=dcos&at=9.2.0.0%2F16"}} {
		b := open(t, br, p.width, p.height)
		b.media("prefers-color-scheme:"+p.theme, "prefers-reduced-motion:reduce")
		b.visit(c.url + "/" + p.hash)
		b.wait(views[p.view].name, views[p.view].ready+" && document.querySelector('#live').dataset.live === 'on'")
		shot := b.picture()
		img, err := png.Decode(bytes.NewReader(shot))
		must(t, err)
		if size := img.Bounds().Size(); size.X != int(p.width) || size.Y != int(p.height) || len(shot) > 200<<10 {
			t.Errorf("the picture %s has %v and %d bytes", p.name, size, len(shot))
		}
		must(t, os.WriteFile(filepath.Join(dir, "page-"+p.name+".png"), shot, 0o644))
	}
}

// manyEvents has containers come and go at 100 a second, and looks for tasks that
// would keep the page from answering.
func manyEvents(t *testing.T, br context.Context, c *coordinator, agents []*agent) {
	ctx, stop := context.WithCancel(t.Context())
	var sent atomic.Int64
	var senders errgroup.Group
	senders.SetLimit(32)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for n := 0; ; n++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			a := agents[2+n%(len(agents)-2)]
			senders.Go(func() error { // one that comes, one that goes
				x := a.attachment(90, fmt.Sprintf("burst-%d", n))
				for _, err := range []error{a.report(ctx, false, []object{x}, nil, nil), a.report(ctx, false, nil, []string{key(x)}, nil)} {
					if err != nil && ctx.Err() == nil {
						t.Error(err)
					}
					sent.Add(1)
				}
				return nil
			})
		}
	}()
	defer func() { stop(); <-done; senders.Wait() }()
	best := 1 << 30
	for round := 0; round < 3 && best > 200; round++ { // somebody else may need the processors
		b := open(t, br, 1280, 800)
		b.measure()
		b.visit(c.url + "/#/events")
		b.wait("the events", views[6].ready+" && document.querySelector('#live').dataset.live === 'on'")
		const received = "Number(document.querySelector('.count').innerText.match(/([0-9,]+) received/)[1].replace(',', ''))"
		old := eval[int64](b, received) // some are remembered
		worst, before, began := 0, sent.Load(), time.Now()
		for _, v := range []int{0, 1, 2, 3, 6} {
			eval[bool](b, fmt.Sprintf("(window.long.length = 0, location.hash = %s, true)", js(views[v].hash)))
			b.wait(views[v].name, views[v].ready)
			eval[bool](b, "new Promise(r => setTimeout(() => r(true), 2500))")
			long := eval[[]int](b, "window.long")
			t.Logf("%-10s long tasks (ms): %v", views[v].name, long)
			if len(long) > 0 {
				worst = max(worst, slices.Max(long))
			}
		}
		n, took := sent.Load()-before, time.Since(began)
		rate := float64(n) / took.Seconds()
		t.Logf("%d containers came or went in %s, %.0f a second; the page has %s", n, took.Round(time.Millisecond), rate, b.text(".count"))
		b.wait("all events", fmt.Sprintf("%s >= %d", received, old+n))
		if rate > 90 { // else the machine is too busy to say something
			best = min(best, worst)
		}
	}
	if best > 200 {
		t.Errorf("a task took %d ms, want at most 200", best)
	}
}
