package page

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
)

// top is the top of the tree.
const top = "../.."

// patience is how long a test waits for what must happen.
const patience = time.Minute

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// browser starts one Chromium for a test and what is below it.
func browser(t *testing.T) context.Context {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is not installed; scripts/browser does it")
	}
	profile := t.TempDir()
	opts := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.DisableGPU, chromedp.UserDataDir(profile),
		chromedp.Flag("disable-dev-shm-usage", true), chromedp.Flag("force-color-profile", "srgb"))
	ctx, stop := chromedp.NewExecAllocator(context.Background(), opts...)
	ctx, cancel := chromedp.NewContext(ctx)
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil {
			t.Logf("end the browser: %v", err)
		}
		cancel()
		stop()
		for range 100 { // its children write on for a moment
			if os.RemoveAll(profile) == nil {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	must(t, chromedp.Do(ctx))
	return ctx
}

// tab is a tab with cookies and storage of its own.
type tab struct {
	t   *testing.T
	ctx context.Context

	mu  sync.Mutex
	bad []string // errors and warnings of the console
}

// open makes a tab of a size. What the page complains about in the console fails
// the test, unless it contains one of the texts that are expected.
func open(t *testing.T, browser context.Context, width, height int64, expected ...string) *tab {
	t.Helper()
	ctx, cancel := chromedp.NewContext(browser, chromedp.WithNewBrowserContext())
	b := &tab{t: t, ctx: ctx}
	messages := chromedp.Console(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for m, err := range messages {
			if err != nil {
				return
			}
			if m.IsException() || m.Type == "error" || m.Type == "warning" || m.Type == "assert" {
				b.mu.Lock()
				b.bad = append(b.bad, m.String())
				b.mu.Unlock()
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		for _, m := range b.bad {
			known := false
			for _, e := range expected {
				known = known || strings.Contains(m, e)
			}
			if !known {
				t.Errorf("in the console: %s", m)
			}
		}
	})
	b.do(chromedp.EmulateViewport(width, height))
	return b
}

func (b *tab) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	must(b.t, chromedp.Do(b.ctx, steps...))
}

// media says which theme and how much motion the system wants.
func (b *tab) media(features ...string) {
	b.t.Helper()
	var p emulation.SetEmulatedMediaParams
	for _, f := range features {
		name, value, _ := strings.Cut(f, ":")
		p.Features = append(p.Features, &emulation.MediaFeature{Name: name, Value: value})
	}
	_, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, p)
	must(b.t, err)
}

func (b *tab) visit(url string) {
	b.t.Helper()
	b.do(chromedp.Navigate(url))
}

// eval evaluates an expression of JavaScript, and waits for a promise.
func eval[T any](b *tab, expression string) T {
	b.t.Helper()
	v, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		b.t.Fatalf("%s: %v", expression, err)
	}
	return v
}

// wait waits until an expression holds.
func (b *tab) wait(what, expression string) {
	b.t.Helper()
	for deadline := time.Now().Add(patience); !eval[bool](b, "Boolean("+expression+")"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.t.Fatalf("still not: %s\n%s\nthe page has: %.3000s", what, expression, b.text("body"))
		}
	}
}

// text is what a person reads in an element.
func (b *tab) text(selector string) string {
	b.t.Helper()
	return eval[string](b, fmt.Sprintf("(document.querySelector(%s) || {innerText: ''}).innerText", js(selector)))
}

// js is a value as JavaScript.
func js(v any) string {
	s, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(s)
}

// fill sets the value of a field, as typing would.
func (b *tab) fill(selector, value string) {
	b.t.Helper()
	eval[bool](b, fmt.Sprintf(`(() => { const e = document.querySelector(%s); e.value = %s; e.dispatchEvent(new Event(e.tagName === 'SELECT' ? 'change' : 'input', {bubbles: true})); return true })()`, js(selector), js(value)))
}

// key presses keys.
func (b *tab) key(keys string) {
	b.t.Helper()
	b.do(chromedp.KeyEvent(keys))
}

// picture is the screen as a PNG.
func (b *tab) picture() []byte {
	b.t.Helper()
	png, err := chromedp.Run(b.ctx, chromedp.CaptureScreenshot())
	must(b.t, err)
	return png
}

// violation is what axe-core finds.
type violation struct {
	ID, Impact, Help string
	Nodes            []struct {
		HTML           string
		FailureSummary string
	}
}

// accessible has axe-core look at the page as it is, by some rules or all.
func (b *tab) accessible(what string, rules ...string) {
	b.t.Helper()
	path := filepath.Join(top, "bin/tools/axe/axe.js")
	source, err := os.ReadFile(path)
	if err != nil {
		b.t.Skip("axe-core is not there; scripts/browser fetches it")
	}
	b.do(chromedp.Evaluate[chromedp.Void](string(source)))
	found := eval[struct {
		Violations []violation
		Passes     int
	}](b, fmt.Sprintf(`axe.run(document, {resultTypes: ['violations'], ...(%[1]s ? {runOnly: %[1]s} : {})}).then(r => ({violations: r.violations, passes: r.passes.length}))`, js(rules)))
	if least := map[bool]int{true: 10, false: len(rules)}[rules == nil]; found.Passes < least {
		b.t.Errorf("%s: axe-core looked at nothing: %d rules passed", what, found.Passes)
	}
	for _, v := range found.Violations {
		for _, n := range v.Nodes {
			b.t.Errorf("%s: %s (%s): %s\n  %.300s\n  %s", what, v.ID, v.Impact, v.Help, n.HTML, n.FailureSummary)
		}
	}
}
