package conf

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// Runtimes as they are told.
const (
	RuntimeDocker     = "docker"
	RuntimePodman     = "podman"
	RuntimeContainerd = "containerd"
	RuntimeCRIO       = "cri-o"
	RuntimeMesos      = "mesos"
)

// MaxName is the most that is kept of a container's name, in bytes: a pod's with its
// namespace may have 317, and few have 60.
const MaxName = 128

// Origin is which runtime a container is of, and what it is called there. What is
// not known is empty. It is what the runtime says and proves nothing.
type Origin struct {
	Runtime string `json:"runtime,omitempty"`
	Name    string `json:"name,omitempty"`
}

// CleanName is a container's name as it is kept: without what does not print, which
// a terminal might obey, and at most MaxName bytes of it.
func CleanName(s string) string {
	if len(s) > 2*MaxName {
		s = s[:2*MaxName] // whoever makes it huge does not have us read it all
	}
	s = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !strconv.IsPrint(r) {
			return -1
		}
		return r
	}, s)
	if len(s) <= MaxName {
		return s
	}
	n := MaxName
	for !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
