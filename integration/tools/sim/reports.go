package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// What agents report of their containers, and what that costs: the same storm is
// gone through without and with reports, in turn, each with a coordinator of its
// own, and the better of two counts.

const rounds = 2

// worthComparing is how many agents a storm needs to last longer than the scheduler's
// moods.
const worthComparing = 16_384

// packReports makes the bodies of the reports beforehand: the simulator shares the
// cores with what it measures, and agents pack on their own hosts.
func (s *sim) packReports() error {
	if s.containers == 0 {
		return nil
	}
	s.reports = make([][]byte, s.agents)
	packer, err := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	if err != nil {
		return err
	}
	for n := range s.reports {
		var b bytes.Buffer
		packer.Reset(&b)
		if err := json.NewEncoder(packer).Encode(reportOf(n, s.containers)); err != nil {
			return err
		}
		if err := packer.Close(); err != nil {
			return err
		}
		s.reports[n] = b.Bytes()
	}
	return nil
}

// reportOf is what an agent with so many containers reports: ids of 64 digits, and
// names.
func reportOf(n, containers int) any {
	type attachment struct {
		Network   string   `json:"network"`
		ID        string   `json:"id"`
		IfName    string   `json:"ifname"`
		Overlay   string   `json:"overlay"`
		Half      string   `json:"half"`
		Addresses []string `json:"addresses"`
		Since     int      `json:"since"`
		Runtime   string   `json:"runtime"`
		Name      string   `json:"name"`
	}
	type usage struct {
		Overlay string `json:"overlay"`
		Half    string `json:"half"`
		Subnet  string `json:"subnet"`
		Total   int    `json:"total"`
		Used    int    `json:"used"`
		Cooling int    `json:"cooling"`
		Free    int    `json:"free"`
	}
	report := struct {
		AgentID  string       `json:"agent_id"`
		Instance string       `json:"instance"`
		Sequence int          `json:"sequence"`
		Snapshot bool         `json:"snapshot"`
		Put      []attachment `json:"put"`
		Usage    []usage      `json:"usage"`
	}{AgentID: agentID(n), Instance: fmt.Sprintf("%026d", n), Sequence: 1, Snapshot: true}
	block := fmt.Sprintf("9.%d.%d.", n>>8, n&255)
	for i := range containers {
		id := sha256.Sum256(fmt.Appendf(nil, "%d/%d", n, i))
		report.Put = append(report.Put, attachment{
			Network: "v4", ID: hex.EncodeToString(id[:]), IfName: "eth0", Overlay: "v4", Half: "docker",
			Addresses: []string{block + strconv.Itoa(130+i)}, Since: 1_790_000_000 + i, Runtime: "containerd", Name: fmt.Sprintf("service-%05d-%05d", n, i),
		})
	}
	for half, subnet := range map[string]string{"mesos": block + "0/25", "docker": block + "128/25"} {
		used := map[string]int{"docker": containers}[half]
		report.Usage = append(report.Usage, usage{Overlay: "v4", Half: half, Subnet: subnet, Total: 125, Used: used, Free: 125 - used})
	}
	return report
}

// reportContainers sends what the nth agent has.
func (c *conn) reportContainers(n int, packed []byte) error {
	status, b, err := c.send("/v1/attachments", "Content-Encoding: gzip\r\n", string(packed))
	if err != nil {
		return fmt.Errorf("report of the containers of %s: %w", agentID(n), err)
	}
	if status != "204 No Content" {
		return fmt.Errorf("report of the containers of %s: %s: %s", agentID(n), status, b)
	}
	return nil
}

// reportLater has the nth agent report when a coordinator would ask it: agents that
// follow nobody cannot be asked.
func (s *sim) reportLater(n int) {
	if s.reports == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unheard = append(s.unheard, n)
}

// The pace at which a coordinator asks, while agents join and after that.
const (
	askEvery  = 50 * time.Millisecond
	askAtOnce = 150
	askBusy   = 5
)

// report has agents report at that pace until all have, on as many connections at a
// time as a storm has (-conns): without that bound they take all files of a machine
// that is slower than the pace.
func (s *sim) report(ctx context.Context) error {
	var reporting sync.WaitGroup
	defer reporting.Wait()
	var failed atomic.Pointer[error]
	var open atomic.Int64
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if err := failed.Load(); err != nil {
			return *err
		}
		s.mu.Lock()
		most := askBusy
		if s.joined {
			most = askAtOnce
		}
		most = max(0, min(most, s.conns-int(open.Load())))
		some := s.unheard[:min(most, len(s.unheard))]
		s.unheard = s.unheard[len(some):]
		done := s.joined && len(s.unheard)+len(some) == 0
		s.mu.Unlock()
		if done {
			reporting.Wait()
			if err := failed.Load(); err != nil {
				return *err
			}
			return nil
		}
		for _, n := range some {
			open.Add(1)
			reporting.Go(func() {
				defer open.Add(-1)
				if err := s.reportOne(ctx, n); err != nil {
					failed.CompareAndSwap(nil, &err)
				}
			})
		}
	}
}

// How often an agent sends a report in all when its connection ends before there is an
// answer, and how long it waits at first. Agents go on for ever; here a coordinator that
// ends so many in a row is found out.
const (
	reportTries = 6
	firstPause  = 100 * time.Millisecond
)

// reportOne has the nth agent report, and again as agents do when the coordinator ends
// the connection. An answer that says no is none to try again after.
func (s *sim) reportOne(ctx context.Context, n int) error {
	pause := firstPause
	for try := 1; ; try++ {
		c, err := s.coord.dial(ctx, n, 1<<10)
		if err == nil {
			err = c.reportContainers(n, s.reports[n])
			c.Close()
		}
		if err == nil || !hungUp(err) {
			return err
		}
		if try == reportTries {
			return fmt.Errorf("after %d tries: %w", try, err)
		}
		s.again.Add(1)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		pause *= 2
	}
}

// hungUp reports whether the other side has ended the connection, or did not take it.
func hungUp(err error) bool {
	return slices.ContainsFunc([]error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE}, func(e error) bool {
		return errors.Is(err, e)
	})
}

// live is the memory that is in use at a coordinator, in bytes, as its last look for
// garbage has found it.
func (s *sim) live(ctx context.Context) (float64, error) {
	get := func(path string) (string, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.coord.addr+path, nil)
		if err != nil {
			return "", err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return string(b), err
	}
	const (
		collections = 2 // the first may have begun while there was work
		tries       = 500
	)
	began := -1.0
	for range tries { // each makes garbage, which has what was before looked for
		if _, err := get("/v1/agents"); err != nil {
			return 0, err
		}
		page, err := get("/metrics")
		if err != nil {
			return 0, err
		}
		goal, err1 := metric(page, "go_memstats_next_gc_bytes")
		percent, err2 := metric(page, "go_gc_gogc_percent")
		done, err3 := metric(page, "go_gc_duration_seconds_count")
		if err := errors.Join(err1, err2, err3); err != nil {
			return 0, err
		}
		if began < 0 {
			began = done
		}
		if done >= began+collections {
			return goal / (1 + percent/100), nil
		}
	}
	return 0, fmt.Errorf("the coordinator has not looked for garbage within %d requests", tries)
}

func metric(page, name string) (float64, error) {
	for line := range strings.Lines(page) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strconv.ParseFloat(strings.TrimSpace(value), 64)
		}
	}
	return 0, fmt.Errorf("the metrics have no %s", name)
}

// stormOf is how long a storm took until all had a lease, and the memory in use then.
// Of how often reports were sent again the most counts, of the rest the least.
type stormOf struct{ seconds, bytes, late, cpu, again float64 }

// oneStorm goes through early and storm alone.
func oneStorm(ctx context.Context, c config, containers int) (out stormOf, err error) {
	c.containers = containers
	c.dir = filepath.Join(c.dir, "storm")
	if err := os.MkdirAll(c.dir, 0o755); err != nil {
		return out, err
	}
	defer os.RemoveAll(c.dir)
	err = oneRun(ctx, c, func(ctx, followers context.Context, s *sim) error {
		s.part = "early"
		if err := s.early(ctx, followers); err != nil {
			return err
		}
		s.part = "storm"
		all := make(chan error, 1)
		go func() { all <- s.report(ctx) }()
		if err := s.storm(ctx, followers); err != nil {
			return err
		}
		ended := time.Now()
		s.mu.Lock()
		s.joined = true
		s.mu.Unlock()
		if err := <-all; err != nil {
			return err
		}
		out.late, out.again = time.Since(ended).Seconds(), float64(s.again.Load())
		for _, row := range s.Rows {
			if row.Name == untilLeased {
				out.seconds = row.P50
			}
		}
		var err error
		if out.cpu, err = s.coord.cpu(); err != nil {
			return err
		}
		out.bytes, err = s.live(ctx)
		return err
	})
	return out, err
}

// compareReports adds what the reports of all agents cost.
func compareReports(ctx context.Context, c config, r *Report) error {
	best := map[int]stormOf{}
	for range rounds {
		for _, containers := range []int{0, c.containers} {
			got, err := oneStorm(ctx, c, containers)
			if err != nil {
				return fmt.Errorf("storm with %d containers each: %w", containers, err)
			}
			if b, ok := best[containers]; ok {
				got.late, got.again = max(got.late, b.late), max(got.again, b.again)
				got.seconds, got.bytes, got.cpu = min(got.seconds, b.seconds), min(got.bytes, b.bytes), min(got.cpu, b.cpu)
			}
			best[containers] = got
		}
	}
	without, with := best[0], best[c.containers]
	all := float64(c.agents * c.containers)
	r.part = "reports"
	r.add("until all have a lease, without reports", "s", without.seconds)
	r.add(fmt.Sprintf("until all have a lease, each reports %d containers", c.containers), "s", with.seconds)
	r.add("CPU of the coordinator until then, without reports", "s", without.cpu)
	r.add("CPU of the coordinator until all have reported", "s", with.cpu)
	r.add("everybody follows until all have reported", "s", with.late)
	r.add("reports that were sent again, because the connection ended", "", with.again)
	r.add("memory in use, without reports", "MiB", without.bytes/(1<<20))
	r.add("memory in use, with reports", "MiB", with.bytes/(1<<20))
	if c.agents >= worthComparing {
		r.atMost("storm with reports against the same without", with.seconds/without.seconds, 1.15)
	}
	// A few thousand containers weigh less than what the collector happens to leave.
	if per := (with.bytes - without.bytes) / all; c.agents >= worthComparing {
		r.atMost("memory of the coordinator per container (bytes)", per, 120)
	} else {
		r.add("memory of the coordinator per container", "bytes", per)
	}
	return nil
}
