package etcd

import (
	"fmt"
	"net/url"
	"strings"
)

// DefaultPrefix is in front of every key unless another is given.
const DefaultPrefix = "/overlay"

// Parse reads URL[,URL...][/prefix], what follows "etcd:" in --store. A URL
// without a scheme is https when certificates are given, and http otherwise.
func Parse(text string, secure bool) (endpoints []string, prefix string, err error) {
	list := strings.Split(text, ",")
	prefix = DefaultPrefix
	for i, part := range list {
		part = strings.TrimPrefix(strings.TrimSpace(part), "//")
		if !strings.Contains(part, "://") {
			if secure {
				part = "https://" + part
			} else {
				part = "http://" + part
			}
		}
		u, err := url.Parse(part)
		switch {
		case err != nil:
			return nil, "", fmt.Errorf("%q: %w", part, err)
		case u.Scheme != "http" && u.Scheme != "https":
			return nil, "", fmt.Errorf("%q: want http:// or https://", part)
		case u.Hostname() == "":
			return nil, "", fmt.Errorf("%q: no host in it; want for example https://10.0.0.1:2379", part)
		case u.User != nil || u.RawQuery != "" || u.Fragment != "":
			return nil, "", fmt.Errorf("%q: want scheme, host and port only; identity goes with --store-cert and --store-key", u.Redacted())
		}
		if path := strings.TrimRight(u.Path, "/"); path != "" {
			if i < len(list)-1 {
				return nil, "", fmt.Errorf("%q: a key prefix stands after the last URL only", part)
			}
			prefix = path
		}
		if u.Port() == "" {
			u.Host += ":2379"
		}
		endpoints = append(endpoints, u.Scheme+"://"+u.Host)
	}
	return endpoints, prefix, nil
}
