package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/datapath"
	"overlayd.internal/overlay/overlayd/internal/dirwatch"
	"overlayd.internal/overlay/overlayd/internal/problems"
	"overlayd.internal/overlay/overlayd/internal/runtimes"
)

// loop owns everything the agent knows. All its methods run on its goroutine;
// recall runs before it starts. What it knows is in four parts.
type loop struct {
	agent    *Agent
	opts     Options
	timing   timing
	id       string
	instance *instance
	boot     boot
	log      *slog.Logger
	problems *problems.Set
	files    *files
	dp       *datapath.Datapath
	group    *errgroup.Group // of the goroutines of Run

	room      *room
	registrar *registrar
	reporter  *reporter
	inventory *inventory
	surveyor  *surveyor
	runtimes  *runtimes.Keeper
	watched   *dirwatch.Watch // the run directory

	lease     leaseState
	peers     peerState
	outcome   outcome
	published published
	drift     driftLog

	apply  *deadline // send the difference to the kernel
	resync *deadline // compare with the kernel
	look   *deadline // compare the document with the one on disk
	tidy   *deadline // give back memory

	// direct ends the time in which peers are still listened to without VXLAN.
	direct *deadline

	atHome chan struct{} // capacity 1: the client is back at its own coordinator
}

// leaseState is what the coordinator granted. Invariant: held passed checkLease
// for this agent id, and only an answer of a coordinator of the same cluster
// replaces it.
type leaseState struct {
	ip      netip.Addr                 // agent IP: the VTEP sends from it
	current atomic.Pointer[netip.Addr] // ip, for the registrar
	// rejected is the address that the coordinator refused last; nil: none.
	rejected  atomic.Pointer[rejection]
	refusedAt time.Time // when the stream was ended for another address

	held  *heldLease                 // nil: none
	shown atomic.Pointer[conf.Lease] // that of held, for the registrar
	// left are the subnets, by overlay, that were this host's before it and are another
	// host's, and of which containers may be left.
	left   map[string][]netip.Prefix
	stored time.Duration // when it ends (as boot.expires) by what is on disk
	online bool          // registered since the start
	// unconfirmed: it was recalled at another address than it was granted to,
	// so it may be that of the host whose disk this one has a copy of. It is
	// applied when the coordinator has accepted it or does not answer.
	unconfirmed bool
	// listening: peers may still send without VXLAN, though this host no longer
	// wants them to.
	listening bool
	// kept says of which overlays the halves stay as they were, though the coordinator
	// says otherwise.
	kept []string

	// asks is what the next registration asks for besides the lease; nil: nothing.
	asks atomic.Pointer[roomAsks]
	// short are the overlays of which the last answer gave less than was wanted.
	short map[string]bool

	refusal  string  // why the last registration failed; "" if it did not
	causes   *causes // of the failures since the last one that did not
	conflict string  // which other host has our identity; "": none has
	phase    phase   // the last one that was logged
}

// peerState is what the stream of peers said. Invariant: claims are the peers of
// the cluster as of position, no more and no less, once complete.
type peerState struct {
	claims     *claims
	clusterID  string    // of the peers
	position   api.Known // in the stream
	complete   bool      // what was missed while the agent was away has come
	in         chan peerEvent
	generation int                // of the last watcher
	stop       context.CancelFunc // ends the watcher; nil: there is none
	following  bool               // its stream is open and has brought an event
	since      time.Time          // of the last change of following, or of the last renewal without it
	broken     error              // why the stream ended

	backlog *deadline // by then it is complete
	silent  *deadline // by then the peers are followed, or it is a problem
	save    *deadline // write them
	saving  bool      // they are being written
	saved   chan error

	appliedAt time.Time     // when a change was last applied
	applyTook time.Duration // and how long that took
}

// outcome is what became of it in the kernel. Invariant: report is of the lease
// that is held exactly if applied.
type outcome struct {
	report       datapath.Report
	applied      bool
	attempts     int                           // rounds since the lease changed, until all was well
	healthy      bool                          // all was well once since the lease changed
	failing      bool                          // something failed in the last round
	lost         string                        // why our lease no longer holds
	left         map[string]int                // containers on bridges that are not wanted, by overlay
	reported     map[string]conf.OverlayStatus // to the coordinator
	retry        backoff
	repairs      allowance // of looks at the kernel
	kernelEvents bool      // came since the last resync
}

// published is what other programs read. Invariant: document is, byte for byte,
// what was last written to state.json or found there; nil if it is not ours.
type published struct {
	document []byte
	state    conf.State // of document
	lookedAt time.Time  // when it was last compared with the file
	err      error      // why what is to be published could not be written
	putBack  bool       // the state directory has to be filled again
	written  int        // how often the runtimes' files were seen to
}

// loopParts are what Run opened for the loop.
type loopParts struct {
	id       string
	instance *instance
	bootID   string
	log      *slog.Logger
	files    *files
	dp       *datapath.Datapath
	group    *errgroup.Group
}

func (a *Agent) newLoop(p loopParts) *loop {
	o := a.opts
	l := &loop{
		agent: a, opts: o, timing: a.timing, id: p.id, log: p.log, files: p.files, dp: p.dp, group: p.group,
		problems: problems.New(p.log), instance: p.instance,
		boot:     boot{id: p.bootID, now: conf.Boottime},
		atHome:   make(chan struct{}, 1),
		runtimes: runtimes.NewKeeper(o.runtimeFiles(p.log), a.timing.files),
		watched:  dirwatch.New(),
		lease:    leaseState{causes: newCauses()},
		peers: peerState{
			claims: newClaims(), in: make(chan peerEvent), saved: make(chan error, 1),
			backlog: newDeadline(), silent: newDeadline(), save: newDeadline(),
		},
		outcome: outcome{
			retry: backoff{min: a.timing.retryMin, max: a.timing.resync},
			// What the kernel tells of the agent's own start is not to have everything
			// looked at five times, nor once while the peers are still to come.
			repairs: allowance{most: repairsAtOnce, pause: a.timing.kernelPause, spent: repairsAtOnce * a.timing.kernelPause, at: time.Now()},
		},
		apply: newDeadline(), direct: newDeadline(), resync: newDeadline(), look: newDeadline(), tidy: newDeadline(),
	}
	l.drift = driftLog{log: p.log, count: a.counts.drifted}
	l.setIP(o.IP)
	l.hold(nil)
	l.registrar = &registrar{
		ask:    o.Coordinator.Register,
		find:   l.findIP,
		under:  o.underlayOf,
		held:   func() conf.Lease { return *l.lease.shown.Load() },
		asks:   l.lease.asks.Load,
		moveOn: o.Coordinator.MoveOn,
		again:  o.Coordinator.Reconnect,
		req: api.RegisterRequest{
			AgentID: p.id, Bridges: o.Bridges, Version: o.Version, Instance: p.instance.own, Previous: p.instance.previous, SharedHalves: true,
			Underlay: conf.Underlay{Direct: o.Routing == conf.RoutingDirect, TwoFamilies: true},
		},
		boot:   l.boot,
		timing: a.timing,
		kick:   make(chan struct{}, 1),
		out:    make(chan registration),
	}
	l.room = a.newRoom(p.log)
	l.reporter = &reporter{
		send:   o.Coordinator.Report,
		timing: a.timing, problems: problems.New(p.log),
		in:       make(chan api.StatusReport, 1),
		register: l.registrar.kick,
	}
	l.inventory = a.newInventory(p.id, p.instance.own, p.log)
	l.surveyor = a.newSurveyor(p.id, p.log)
	return l
}

// run is the control loop. It returns nil when ctx is done.
func (l *loop) run(ctx context.Context, changes <-chan struct{}) error {
	defer l.flushPeers()
	defer l.watched.Close()
	l.tidy.in(l.timing.tidy)
	l.checkDocument()
	if l.lease.held != nil {
		l.checkIP(ctx)
		l.lease.unconfirmed = !onHost(l.lease.held.AgentIP)
		l.reconcile(ctx, true)
	}
	l.beat()
	for {
		select {
		case <-ctx.Done():
			return nil
		case r := <-l.registrar.out:
			l.registered(ctx, r)
		case p := <-l.peers.in:
			l.peersChanged(p)
		case n := <-l.room.out:
			l.roomChanged(ctx, n)
		case _, ok := <-changes:
			if !ok {
				changes = nil
				continue
			}
			l.kernelChanged()
		case <-l.agent.fast.Changed():
			l.publish()
		case <-l.agent.firewall:
			l.kernelChanged()
		case <-l.atHome:
			if l.peers.stop != nil {
				l.follow(ctx)
			}
		case err := <-l.runtimes.Done():
			l.filesWritten(err)
		case <-l.watched.Events():
			l.runDirChanged()
		case <-l.look.timer.C:
			l.checkDocument()
			l.beat()
		case <-l.apply.timer.C:
			l.applyPeers(ctx)
		case <-l.direct.timer.C:
			l.direct.clear()
			l.stopDirect(ctx)
		case <-l.peers.backlog.timer.C:
			l.peers.backlog.clear()
			l.peers.complete = true
			l.applyPeers(ctx)
		case <-l.peers.silent.timer.C:
			l.peers.silent.clear()
			l.publish()
		case <-l.resync.timer.C:
			l.resync.clear()
			l.maintain(ctx)
		case <-l.peers.save.timer.C:
			l.peers.save.clear()
			l.savePeers()
		case err := <-l.peers.saved:
			l.peersSaved(err)
		case <-l.tidy.timer.C:
			l.tidy.clear()
			l.giveBack()
		}
	}
}

// beat says that the loop runs.
func (l *loop) beat() {
	if l.opts.Beat != nil {
		l.opts.Beat()
	}
}

// maintain is the slow round: whatever has to be looked at now and then even
// though no event was received of it has its place here.
func (l *loop) maintain(ctx context.Context) {
	if l.outcome.kernelEvents && (!l.opts.IP.IsValid() || l.opts.seeksSecond()) {
		kick(l.registrar.kick) // the agent IPs may be others now
	}
	l.outcome.kernelEvents = false
	l.keepDirs()
	l.readDocument()
	l.reconcile(ctx, true)
	l.logPhase()
}
