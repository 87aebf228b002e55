package report

import (
	"bytes"
	"regexp"
	"slices"
)

const removed = "[removed]"

// names are what the name of a secret has in it.
const names = `(?:token|passw(?:or)?d|passphrase|secret|authorization|bearer|credential|api[-_]?key|private[-_]?key|access[-_]?key|` +
	`preshared|psk|[a-z0-9][-_]key|(?:key|certificate|certificate-authority)-data)`

// quoted is a text in quotes, also in those of JSON that is itself in a JSON text.
const quoted = `"(?:\\.|[^"\\\n])*"|'(?:''|[^'\n])*'|\\"(?:\\\\(?:\\"|.)|[^"\\\n])*\\"`

// A scrubber takes secrets out of texts: keys, certificates, tokens, passwords, and
// whatever stands behind a name that says that it is one.
type scrubber struct {
	pems    *regexp.Regexp // keys and certificates, also where an end is missing
	tokens  *regexp.Regexp
	users   *regexp.Regexp // what stands before the host of a URL: some put a token there
	bearers *regexp.Regexp
	flags   *regexp.Regexp
	lines   *regexp.Regexp // YAML: a text goes on to the end of the line, or over those that follow
	pairs   *regexp.Regexp // a name and what it says, as in JSON or in the environment
	places  *regexp.Regexp // names that say where a secret lies
}

func newScrubber() *scrubber {
	return &scrubber{
		pems:    regexp.MustCompile(`(?s)-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|$)`),
		tokens:  regexp.MustCompile(`\bovl[a-z0-9]*_[A-Za-z0-9-]{8,}_[A-Za-z0-9-]{4,}_[A-Za-z0-9-]{8,}`),
		users:   regexp.MustCompile(`(://)[^/\s@"',]+@`),
		bearers: regexp.MustCompile(`(?i)\b(bearer )[a-z0-9._~+/=-]{8,}`),
		flags:   regexp.MustCompile(`(?i)(--[a-z0-9-]*` + names + `[= ]+)(?:` + quoted + `|\S+)`),
		lines: regexp.MustCompile(`(?im)^([ \t]*(?:- )?["']?[a-z0-9_.-]*` + names + `[a-z0-9_-]*["']?[ \t]*:[ \t]+)` +
			`(?:[|>][-+0-9]*[ \t]*(?:\n[ \t]+[^\n]*|\n[ \t]*)*|[^\s"'\[{|>][^\n]*)`),
		pairs: regexp.MustCompile(`(?i)([a-z0-9_.-]*` + names + `[a-z0-9_-]*(?:\\?["'])?[ \t]*[:=][ \t]*)` +
			`(?:bearer |basic )?(?:` + quoted + `|\[[^\]]*\]|\{[^{}]*\}|[^\s,}]+)`),
		places: regexp.MustCompile(`(?i)(?:file|path|dir)(?:\\?["'])?[ \t]*[:=][ \t]*$`),
	}
}

func (s *scrubber) scrub(b []byte) []byte {
	b = s.pems.ReplaceAll(b, []byte(removed))
	b = s.tokens.ReplaceAll(b, []byte(removed))
	b = s.users.ReplaceAll(b, []byte("${1}"+removed+"@"))
	b = s.bearers.ReplaceAll(b, []byte("${1}"+removed))
	b = s.flags.ReplaceAll(b, []byte("${1}"+removed))
	for _, named := range []*regexp.Regexp{s.lines, s.pairs} {
		b = named.ReplaceAllFunc(b, func(found []byte) []byte {
			name := named.FindSubmatch(found)[1]
			if s.places.Match(name) {
				return found
			}
			text := `"` + removed + `"`
			if bytes.Contains(name, []byte(`\"`)) {
				text = `\"` + removed + `\"`
			}
			if bytes.HasSuffix(found, []byte("\n")) {
				text += "\n"
			}
			return append(slices.Clone(name), text...)
		})
	}
	return b
}
