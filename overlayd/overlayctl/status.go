package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/audit"
	"overlayd.internal/overlay/overlayd/internal/cli"
)

// agentTimeout bounds the question to the agent of this host.
const agentTimeout = 5 * time.Second

func (e *env) statusCommand() *cobra.Command {
	wait := time.Duration(0)
	cmd := &cobra.Command{
		Use: "status", Short: "the agent of this host, its overlays, and whether the coordinator answers", Args: cobra.NoArgs,
		Long: `The agent of this host, its overlays, and whether the coordinator answers.

The exit code is 0 if containers can be attached on this host, else 1. That the
coordinator answers is not needed for it.`,
		Example: "  overlayctl status --wait 1m && docker start web",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if wait < 0 {
				return cli.Usagef("--wait %s: must not be negative", wait)
			}
			return e.runStatus(cmd.Context(), wait)
		},
	}
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long to wait at most until containers can be attached, as on a host that has just joined")
	return cmd
}

// lookAgain is the time between two looks of who waits.
const lookAgain = 200 * time.Millisecond

// hostStatus is what status prints as JSON.
type hostStatus struct {
	Running bool        `json:"running"` // the agent answers on its socket
	Error   string      `json:"error,omitempty"`
	Agent   *conf.State `json:"agent,omitempty"` // what it says, or published last

	// Addresses is how full the halves of this host are.
	Addresses []api.AgentAddresses `json:"addresses"`

	Coordinator struct {
		URL       string `json:"url"`
		Reachable bool   `json:"reachable"`
		Error     string `json:"error,omitempty"`
	} `json:"coordinator"`
}

func (e *env) runStatus(ctx context.Context, wait time.Duration) error {
	end := time.Now().Add(wait)
	s := e.lookAtHost(ctx)
	for !s.healthy() && time.Now().Before(end) {
		select {
		case <-time.After(lookAgain):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		s = e.lookAtHost(ctx)
	}
	var agents []string
	if s.Agent != nil {
		agents = s.Agent.Coordinators
	}
	err := e.askCoordinator(ctx, agents, &s)
	if err = cmp.Or(err, context.Cause(ctx)); err != nil {
		return err
	}
	if e.structured() {
		err = e.print(s)
	} else {
		err = e.printStatus(s)
	}
	if err == nil && !s.healthy() {
		err = cli.ErrReported
	}
	return err
}

// lookAtHost is what the agent says, or published last.
func (e *env) lookAtHost(ctx context.Context) (s hostStatus) {
	state, err := askAgent(ctx, e.runDir)
	s.Running = err == nil
	if err != nil {
		s.Error = err.Error()
		state, err = lastPublished(e.runDir)
	}
	if err == nil {
		s.Agent = &state
		s.Addresses = e.halves(ctx, state)
	}
	return s
}

// halves is how full the halves are whose stores can be read; doctor finds the
// others.
func (e *env) halves(ctx context.Context, state conf.State) []api.AgentAddresses {
	out := []api.AgentAddresses{}
	usage, _ := audit.ReadUsage(ctx, e.runDir, state)
	for _, u := range audit.HalfUsages(usage) {
		out = append(out, api.AgentAddresses{AgentID: state.AgentID, AgentIP: state.IP, HalfUsage: u, Level: u.Level()})
	}
	return out
}

// askCoordinator fills in what the coordinator says. That it cannot be asked is
// no reason to keep back what is known of this host; a wrong flag is.
func (e *env) askCoordinator(ctx context.Context, agents []string, s *hostStatus) error {
	client, err := e.clientOr(agents)
	if err != nil {
		if len(e.coordinator) > 0 {
			return err
		}
		s.Coordinator.URL, s.Coordinator.Error = strings.Join(agents, ","), err.Error()
		return nil
	}
	s.Coordinator.URL = strings.Join(client.URLs(), ",")
	if err := client.Ready(ctx); err != nil {
		s.Coordinator.Error = err.Error()
		return nil
	}
	s.Coordinator.Reachable = true
	return nil
}

// healthy reports whether containers can be attached on this host and all else
// that the agent keeps is as it should be. That the
// coordinator answers is not needed for it.
func (s hostStatus) healthy() bool {
	if !s.Running || s.Agent.Lease.Lost != "" || left(s.Agent.Lease) <= 0 || len(s.Agent.Problems) > 0 {
		return false
	}
	for _, o := range s.Agent.Overlays {
		if o.State == nil || o.State.Status != conf.StatusOK {
			return false
		}
	}
	return true
}

// askAgent asks the agent of this host on its socket.
func askAgent(ctx context.Context, runDir string) (state conf.State, err error) {
	ctx, cancel := context.WithTimeout(ctx, agentTimeout)
	defer cancel()
	path := filepath.Join(runDir, conf.SocketFile)
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}
	fail := func(err error) (conf.State, error) {
		return state, fmt.Errorf("the agent of this host does not answer on %s: %w", path, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+api.PathAgentOverlay, nil)
	if err != nil {
		return fail(err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fail(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10)) // for the message alone
		return fail(fmt.Errorf("%s: %s", resp.Status, printable(string(b))))
	}
	if err := json.NewDecoder(resp.Body).Decode(&state); err != nil {
		return fail(err)
	}
	return state, nil
}

// lastPublished reads what the agent left for the CNI programs.
func lastPublished(runDir string) (state conf.State, err error) {
	err = conf.ReadJSON(filepath.Join(runDir, conf.StateFile), &state)
	if errors.Is(err, fs.ErrNotExist) {
		err = errors.New("it has published nothing since the host was booted")
	}
	return state, err
}

func (e *env) printStatus(s hostStatus) error {
	w := newTable(e.stdout)
	line := func(key, value string) { fmt.Fprintf(w, "%s\t%s\n", key, printable(value)) }
	switch {
	case s.Running:
		line("agent", "running, version "+s.Agent.Version)
	case s.Agent != nil:
		line("agent", "NOT RUNNING; what follows is what it published last")
		line("reason", s.Error)
	default:
		line("agent", "NOT RUNNING, and nothing published")
		line("reason", s.Error)
	}
	if a := s.Agent; a != nil {
		line("agent id", a.AgentID)
		if a.IP.IsValid() { // with the lease
			line("agent IP", a.IP.String())
			line("MTU", fmt.Sprint(a.MTU))
		}
		line("lease", leaseText(a.Lease))
		line("datapath", datapathText(a.Datapath))
		if a.Drift != nil {
			line("repaired", driftText(*a.Drift))
		}
		for _, notice := range a.Notices {
			line("notice", notice)
		}
		for _, problem := range a.Problems {
			line("PROBLEM", problem)
		}
	}
	for _, u := range s.Addresses {
		if u.Level != api.LevelOK {
			line(level(u.Level), fmt.Sprintf("the %s of overlay %s: %d of %d used, %d cooling, %d free", u.Half.PoolText(), u.Overlay, u.Used, u.Total, u.Cooling, u.Free))
		}
	}
	reachable := "reachable"
	if !s.Coordinator.Reachable {
		reachable = "NOT REACHABLE: " + s.Coordinator.Error
	}
	line("coordinator", strings.TrimSpace(s.Coordinator.URL+" "+reachable))
	if err := w.Flush(); err != nil || s.Agent == nil {
		return err
	}
	fmt.Fprintln(e.stdout)
	var rows [][]string
	for _, o := range s.Agent.Overlays {
		rows = append(rows, []string{o.Info.Name, blockTexts(o.All()), bridge(o.MesosBridge), bridge(o.DockerBridge), statusText(o.State)})
	}
	return e.printTable([]string{"OVERLAY", "AGENT SUBNET", "MESOS BRIDGE", "DOCKER BRIDGE", "STATUS"}, rows)
}

// left is how long new containers may be attached without a renewal, to the second.
func left(l conf.LeaseState) time.Duration {
	return (time.Duration(l.ExpiresBoottime) - conf.Boottime()).Truncate(time.Second)
}

func leaseText(l conf.LeaseState) string {
	switch {
	case l.Epoch == 0 && l.Error != "":
		return "NONE YET: " + l.Error
	case l.Epoch == 0:
		return "NONE YET"
	case l.Lost != "":
		return "LOST: " + l.Lost
	case left(l) <= 0:
		return fmt.Sprintf("epoch %d, RUN OUT, no new containers until it is renewed: %s", l.Epoch, cmp.Or(l.Error, "the coordinator did not answer"))
	case l.Error != "":
		return fmt.Sprintf("epoch %d, NOT RENEWED, good for another %s: %s", l.Epoch, left(l), l.Error)
	}
	return fmt.Sprintf("epoch %d", l.Epoch)
}

// datapathText says which way traffic between hosts takes, and why not the
// faster one.
func datapathText(d conf.DatapathState) string {
	switch {
	case d.Taken == "":
		return "kernel"
	case d.Reason != "":
		return fmt.Sprintf("%s (%s): %s", d.Taken, d.Mode, d.Reason)
	}
	return fmt.Sprintf("%s (%s)", d.Taken, d.Mode)
}

// driftText says what others changed and the agent put back.
func driftText(d conf.DriftState) string {
	var counts []string
	for _, c := range d.Counts {
		counts = append(counts, fmt.Sprintf("%d %s", c.Objects, c.Kind))
	}
	return fmt.Sprintf("%s; last at %s: %s", strings.Join(counts, ", "), d.LastAt, d.Last)
}

func bridge(b *conf.Bridge) string {
	if b == nil {
		return ""
	}
	return b.Name + " " + prefixes(b.IP, b.IP6)
}
