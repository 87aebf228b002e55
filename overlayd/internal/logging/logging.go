// Package logging makes the log of a daemon, whose level can be changed while it
// runs: over its socket, or by SIGUSR1.
package logging

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"overlayd.internal/overlay/overlayd/internal/cli"
	"overlayd.internal/overlay/overlayd/internal/logkey"
)

// Levels are the words for the levels, from the one that says most.
var Levels = []string{"debug", "info", "warn", "error"}

// Flags say how to log.
type Flags struct{ Level, Format string }

// Declare declares the flags.
func (f *Flags) Declare(fs *pflag.FlagSet) {
	fs.Var(cli.Choice(&f.Level, "info", Levels...), "log-level", "what is logged at least; overlayctl log-level and SIGUSR1 change it")
	fs.Var(cli.Choice(&f.Format, "text", "text", "json"), "log-format", "how a line of the log looks")
}

// Log is a log with a level that can be changed.
type Log struct {
	*slog.Logger
	level *Level
}

// New makes the log that the flags ask for.
func (f *Flags) New(w io.Writer) *Log {
	configured, _ := ParseLevel(f.Level) // a word of Levels
	l := &Level{configured: configured}
	l.v.Set(configured)
	options := &slog.HandlerOptions{Level: &l.v}
	var h slog.Handler = slog.NewTextHandler(w, options)
	if f.Format == "json" {
		h = slog.NewJSONHandler(w, options)
	}
	l.log = slog.New(h)
	return &Log{Logger: l.log, level: l}
}

// Level is what is changed.
func (l *Log) Level() *Level { return l.level }

// Level is the level of a log while it runs. It is safe for concurrent use.
type Level struct {
	v          slog.LevelVar
	configured slog.Level
	log        *slog.Logger
}

// ParseLevel reads one of Levels.
func ParseLevel(s string) (level slog.Level, err error) {
	for _, word := range Levels {
		if s == word {
			return level, level.UnmarshalText([]byte(s))
		}
	}
	return level, fmt.Errorf("%.40q is no level; want %s", s, strings.Join(Levels, ", "))
}

// String is the word for the level as it is now.
func (l *Level) String() string { return strings.ToLower(l.v.Level().String()) }

// Set changes the level, and has the log say so whatever the levels are.
func (l *Level) Set(to slog.Level) {
	from := l.String()
	l.v.Set(to)
	if now := l.String(); now != from {
		l.log.Log(context.Background(), max(to, slog.LevelInfo), "the log level has changed", logkey.From, from, logkey.To, now)
	}
}

// toggle sets debug, or the level of the start where debug is set.
func (l *Level) toggle() {
	switch {
	case l.v.Level() != slog.LevelDebug:
		l.Set(slog.LevelDebug)
	case l.configured == slog.LevelDebug:
		l.Set(slog.LevelInfo)
	default:
		l.Set(l.configured)
	}
}

// ToggleOnSignal has SIGUSR1 set debug, and the next one the level of the start
// again, until ctx ends.
func (l *Level) ToggleOnSignal(ctx context.Context) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGUSR1)
	go func() {
		defer signal.Stop(signals)
		for {
			select {
			case <-signals:
				l.toggle()
			case <-ctx.Done():
				return
			}
		}
	}()
}
