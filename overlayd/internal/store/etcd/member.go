package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	etcdpb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	// callTimeout bounds one call to a member. A member that takes longer hangs.
	callTimeout = 1500 * time.Millisecond
	// probeInterval is how long after one probe the next one begins. A member
	// that hangs is left after both at the latest.
	probeInterval = time.Second
	// alarmInterval is how often the cluster is asked for alarms.
	alarmInterval = 5 * time.Second
	// retryPause is between two attempts at finding a member.
	retryPause = 200 * time.Millisecond
	// logInterval is how often a lasting problem is logged again.
	logInterval = time.Minute
)

// member is the connection to one member. It has one TCP connection, so a probe
// that is answered says that watches on it are alive too.
type member struct {
	endpoint string
	client   *clientv3.Client
	ctx      context.Context // ends when the member is left
	leave    context.CancelFunc
	shakes   handshakes // empty where it speaks plain HTTP
}

func (s *Store) newMember(endpoint string) (*member, error) {
	m := &member{endpoint: endpoint}
	var options []grpc.DialOption
	if s.tls != nil {
		m.shakes = newHandshakes(s.tls)
		options = append(options, grpc.WithTransportCredentials(m.shakes)) // the last one counts
	}
	var err error
	m.client, err = clientv3.New(clientv3.Config{
		Endpoints:            []string{endpoint},
		TLS:                  s.tls,
		DialOptions:          options,
		DialTimeout:          callTimeout,
		DialKeepAliveTime:    10 * time.Second, // gRPC takes no less
		DialKeepAliveTimeout: 3 * time.Second,
		Logger:               zap.NewNop(), // it logs every failed call; problems are logged here, once
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", endpoint, err)
	}
	m.ctx, m.leave = context.WithCancel(context.Background())
	return m, nil
}

// close ends everything that is under way on the connection.
func (m *member) close() error {
	m.leave()
	err := m.client.Close()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// current is the member in use, and a channel that is closed when it is another.
func (s *Store) current() (*member, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.member, s.moved
}

// keepProbing asks the member whether it can serve, and moves when it cannot.
func (s *Store) keepProbing(ctx context.Context) {
	timer := time.NewTimer(probeInterval)
	defer timer.Stop()
	var alarms time.Time
	var logged time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		m, _ := s.current()
		err := s.probe(ctx, m)
		if err != nil && ctx.Err() == nil && s.failure() == nil {
			err = s.findMember(ctx)
		}
		if s.failure() != nil {
			return // watches end with it
		}
		if err == nil && time.Since(alarms) > alarmInterval {
			alarms = time.Now()
			s.askForAlarms(ctx)
		}
		if ctx.Err() == nil {
			s.setProblem(err, &logged)
		}
		wait := probeInterval
		if err != nil {
			wait = retryPause
		}
		timer.Reset(wait)
	}
}

// probe is a read that only a member with a leader and a majority answers.
func (s *Store) probe(ctx context.Context, m *member) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	before := s.high.Load()
	r, err := m.client.Get(ctx, s.prefix, clientv3.WithCountOnly())
	if err != nil {
		return fmt.Errorf("%s: %w", m.endpoint, s.whyNot(m, err))
	}
	return s.sawLinearized(m, r.Header, before)
}

// whyNot explains why a member did not answer.
func (s *Store) whyNot(m *member, err error) error {
	if m.shakes.refusal != nil {
		if refusal := m.shakes.refusal.Load(); refusal != nil {
			return s.options.explainHandshake(*refusal)
		}
	}
	return explain(err)
}

// findMember asks all members at once, with new connections, and takes the one
// that answers first. The error says what each has answered.
func (s *Store) findMember(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		*member
		err error
	}
	answers := make(chan answer, len(s.options.Endpoints))
	for _, endpoint := range s.options.Endpoints {
		go func() {
			m, err := s.newMember(endpoint)
			if err == nil {
				err = s.probe(ctx, m)
			}
			answers <- answer{m, err}
		}()
	}
	var found *member
	var errs []error
	for range s.options.Endpoints {
		a := <-answers
		switch {
		case a.err == nil && found == nil:
			found = a.member
			s.moveTo(found)
			cancel()
			continue
		case a.err != nil && found == nil:
			errs = append(errs, a.err)
		}
		if a.member != nil {
			_ = a.close() // nothing of ours is on it
		}
	}
	if found == nil {
		return errors.Join(errs...)
	}
	return nil
}

func (s *Store) moveTo(m *member) {
	s.mu.Lock()
	old := s.member
	s.member = m
	close(s.moved)
	s.moved = make(chan struct{})
	s.mu.Unlock()
	if old != nil {
		s.log.Warn("left a member of etcd", "from", old.endpoint, "to", m.endpoint)
		_ = old.close() // what is under way ends with an unknown outcome
	}
}

// askForAlarms finds out whether the space quota is used up. Where that is
// forbidden, or fails, the answers to writes tell.
func (s *Store) askForAlarms(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	m, _ := s.current()
	r, err := m.client.AlarmList(ctx)
	if err != nil {
		return
	}
	full := false
	for _, a := range r.Alarms {
		full = full || a.Alarm == etcdpb.AlarmType_NOSPACE
	}
	s.setNoSpace(full)
}

func (s *Store) setNoSpace(full bool) {
	s.mu.Lock()
	was := s.noSpace
	s.noSpace = full
	s.mu.Unlock()
	switch {
	case full && !was:
		s.log.Error("etcd takes no writes", "err", errNoSpace)
	case !full && was:
		s.log.Info("etcd takes writes again")
	}
}

// setProblem keeps why nothing can be read, and logs it when it begins, each
// logInterval, and when it ends.
func (s *Store) setProblem(err error, logged *time.Time) {
	s.mu.Lock()
	was := s.problem
	s.problem = err
	s.mu.Unlock()
	switch {
	case err != nil && (was == nil || time.Since(*logged) > logInterval):
		*logged = time.Now()
		s.log.Error("no member of etcd can serve; leases in use stay, nothing can be leased", "err", err)
	case err == nil && was != nil:
		s.log.Info("etcd can serve again")
	}
}

// Ready is described with store.Store.
func (s *Store) Ready(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.failed != nil:
		return s.failed
	case s.problem != nil:
		return fmt.Errorf("no member of etcd can serve: %w", s.problem)
	case s.noSpace:
		return errNoSpace
	}
	return nil
}

func (s *Store) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// saw takes over the revision and the cluster of an answer.
func (s *Store) saw(h *etcdpb.ResponseHeader) error {
	if !s.cluster.CompareAndSwap(0, h.ClusterId) && s.cluster.Load() != h.ClusterId {
		return s.fail(fmt.Errorf("%w: its cluster id was %x and is %x; the endpoints belong to different clusters, or it was restored from a copy",
			ErrReplaced, s.cluster.Load(), h.ClusterId))
	}
	for rev := uint64(h.Revision); ; {
		high := s.high.Load()
		if rev <= high || s.high.CompareAndSwap(high, rev) {
			return nil
		}
	}
}

// sawLinearized is saw for an answer that is at least as new as everything that
// was seen before the question.
func (s *Store) sawLinearized(m *member, h *etcdpb.ResponseHeader, before uint64) error {
	if uint64(h.Revision) < before {
		return s.fail(fmt.Errorf("%w: %s is at revision %d, but revision %d was read before; it was restored from an older copy",
			ErrReplaced, m.endpoint, h.Revision, before))
	}
	return s.saw(h)
}

// fail ends the use of this etcd for good.
func (s *Store) fail(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == nil {
		s.failed = err
		s.log.Error("etcd cannot be used any longer; restart the coordinator", "err", err)
		if s.member != nil {
			s.member.leave()
		}
	}
	return s.failed
}
