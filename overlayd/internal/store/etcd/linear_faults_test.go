package etcd_test

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"overlayd.internal/overlay/overlayd/internal/store"
	"overlayd.internal/overlay/overlayd/internal/store/etcdtest"
)

type fault struct {
	name string
	run  func()
}

// during is how long a fault lasts.
const during = 2 * time.Second

// faults are run one after the other, each until it has ended.
func (l *linear) faults() []fault {
	c := l.cluster
	leader := func() (m *etcdtest.Member) {
		eventually(l.t, "there is a leader", func() bool { m = c.Leader(); return m != nil })
		return m
	}
	follower := func() *etcdtest.Member {
		m := leader()
		for _, o := range c.Members {
			if o != m {
				return o
			}
		}
		return nil
	}
	cut := func(m *etcdtest.Member, receives, sends bool) {
		m.Cut(receives, sends)
		l.wait(during)
		m.Heal()
		c.Wait()
	}
	return []fault{
		{"the leader is killed", func() { m := leader(); m.Kill(); l.wait(during); m.Restart(); c.Wait() }},
		{"the leader is paused", func() { m := leader(); m.Pause(); l.wait(during); m.Resume(); c.Wait() }},
		{"a follower is paused", func() { m := follower(); m.Pause(); l.wait(during); m.Resume(); c.Wait() }},
		{"the leader is cut off", func() { cut(leader(), true, true) }},
		{"the leader receives nothing", func() { cut(leader(), true, false) }},
		{"the leader sends nothing", func() { cut(leader(), false, true) }},
		{"a coordinator is killed", func() { l.restartCoordinator(0) }},
		{"history is compacted", l.compact},
		{"a member loses its disk", func() { m := follower(); m.Kill(); m.Replace(); c.Wait() }},
		{"the quota is used up", l.exhaust},
		{"coordinators are killed in turn", func() {
			for i := range l.coordinators {
				l.restartCoordinator(i)
			}
		}},
	}
}

// wait lets operations go on for a while.
func (l *linear) wait(d time.Duration) { <-time.After(d) }

// compact forgets all history while the coordinators watch.
func (l *linear) compact() {
	for range 5 {
		s := open(l.t, l.cluster, "/other")
		_, rev, err := s.List(l.t.Context(), "")
		if err != nil {
			l.t.Error(err)
			return
		}
		if _, err := l.cluster.Members[0].Etcdctl("compact", fmt.Sprint(rev)); err != nil && !strings.Contains(err.Error(), "compacted") {
			l.t.Error(err)
		}
		s.Close()
	}
}

// quota is the space that each member may take.
const quota = 32 << 20

// exhaust fills the quota, and makes room after a while.
func (l *linear) exhaust() {
	s := open(l.t, l.cluster, "/fill")
	defer s.Close()
	value := make([]byte, 1<<20)
	full := func() bool {
		_, err := s.Commit(l.t.Context(), store.Txn{Then: []store.Op{{Key: "fill", Value: value}}})
		return err != nil && !errors.Is(err, store.ErrUnknown)
	}
	eventually(l.t, "the quota is used up", full)
	l.wait(during)
	_, rev, err := s.List(l.t.Context(), "")
	if err != nil {
		l.t.Error(err)
	}
	do := func(m *etcdtest.Member, args ...string) {
		l.t.Helper()
		eventually(l.t, strings.Join(args, " "), func() bool {
			_, err := m.Etcdctl(args...)
			return err == nil || strings.Contains(err.Error(), "has been compacted")
		})
	}
	do(l.cluster.Members[0], "compact", "--physical", fmt.Sprint(rev))
	for _, m := range l.cluster.Members {
		do(m, "defrag")
	}
	do(l.cluster.Members[0], "alarm", "disarm")
	put(l.t, s, "fill", "")
}
