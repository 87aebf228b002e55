package logging

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func flags(t *testing.T, args ...string) *Flags {
	t.Helper()
	f, fs := &Flags{}, pflag.NewFlagSet("x", pflag.ContinueOnError)
	f.Declare(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestLevel(t *testing.T) {
	var out bytes.Buffer
	log := flags(t, "--log-level", "error").New(&out)
	log.Warn("not logged")
	log.Level().Set(slog.LevelDebug)
	log.Debug("logged")
	log.Level().Set(slog.LevelWarn)
	log.Info("not logged")
	log.Level().Set(slog.LevelWarn) // no change is none
	var got []string
	for line := range strings.Lines(out.String()) {
		_, message, _ := strings.Cut(line, " ")
		got = append(got, strings.TrimSpace(message))
	}
	want := []string{`level=INFO msg="the log level has changed" from=error to=debug`, "level=DEBUG msg=logged", `level=WARN msg="the log level has changed" from=debug to=warn`}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%q", got)
	}
}

func TestToggle(t *testing.T) {
	for start, want := range map[string]string{"warn": "debug warn debug", "debug": "info debug info"} {
		l := flags(t, "--log-level", start).New(&bytes.Buffer{}).Level()
		var got []string
		for range 3 {
			l.toggle()
			got = append(got, l.String())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("from %s: %v, want %s", start, got, want)
		}
	}
}

func TestJSON(t *testing.T) {
	var out bytes.Buffer
	flags(t, "--log-format", "json").New(&out).Info("x", "k", 1)
	var line struct {
		Msg, Level string
		K          int
	}
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || line.Msg != "x" || line.Level != "INFO" || line.K != 1 {
		t.Errorf("%v: %s", err, out.String())
	}
}

func TestParseLevel(t *testing.T) {
	for _, bad := range []string{"", "DEBUG", "info+1", "trace"} {
		if _, err := ParseLevel(bad); err == nil {
			t.Errorf("%q is a level", bad)
		}
	}
}
