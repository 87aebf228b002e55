package coordinator_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"overlayd.internal/overlay/overlayd/internal/api"
	"overlayd.internal/overlay/overlayd/internal/coordinator"
	"overlayd.internal/overlay/overlayd/internal/logging"
	"overlayd.internal/overlay/overlayd/internal/pki"
)

// description is the document that is served.
type description struct {
	OpenAPI string
	Info    struct{ Title, Version, Description string }
	Paths   map[string]map[string]operation

	Components struct{ Schemas map[string]any }
}

type operation struct {
	Summary     string
	Role        string `json:"x-role"`
	Parameters  []struct{ Name, In, Description string }
	RequestBody struct{ Content map[string]bodySchema }
	Responses   map[string]struct{ Content map[string]bodySchema }
}

type bodySchema struct {
	Schema map[string]any
	Item   map[string]any `json:"x-item"`
}

// check says where a value is not what the schema says. Whoever reads it may not
// meet a key that is not described, so those are wrong, too.
func (d description) check(where string, schema map[string]any, v any) (wrong []string) {
	if ref, ok := schema["$ref"].(string); ok {
		named, _ := d.Components.Schemas[strings.TrimPrefix(ref, "#/components/schemas/")].(map[string]any)
		if named == nil {
			return []string{where + ": there is no " + ref}
		}
		return d.check(where, named, v)
	}
	types, _ := schema["type"].([]any)
	if one, ok := schema["type"].(string); ok {
		types = []any{one}
	}
	if types == nil {
		return nil // anything
	}
	kind := "null"
	switch v := v.(type) {
	case string:
		kind = "string"
		if enum, ok := schema["enum"].([]any); ok && !slices.Contains(enum, any(v)) {
			wrong = append(wrong, fmt.Sprintf("%s: %q is none of %v", where, v, enum))
		}
		if schema["format"] == "date-time" {
			if _, err := time.Parse(time.RFC3339, v); err != nil {
				wrong = append(wrong, where+": "+err.Error())
			}
		}
	case bool:
		kind = "boolean"
	case float64:
		kind = "number"
		if v == float64(int64(v)) && slices.Contains(types, any("integer")) {
			kind = "integer"
		}
	case []any:
		kind = "array"
		for i, e := range v {
			items, _ := schema["items"].(map[string]any)
			wrong = append(wrong, d.check(fmt.Sprintf("%s[%d]", where, i), items, e)...)
		}
	case map[string]any:
		kind = "object"
		wrong = append(wrong, d.object(where, schema, v)...)
	}
	if !slices.Contains(types, any(kind)) {
		wrong = append(wrong, fmt.Sprintf("%s: a %s, want %v", where, kind, types))
	}
	return wrong
}

func (d description) object(where string, schema, v map[string]any) (wrong []string) {
	properties, _ := schema["properties"].(map[string]any)
	others, _ := schema["additionalProperties"].(map[string]any)
	required, _ := schema["required"].([]any)
	for _, key := range required {
		if _, ok := v[key.(string)]; !ok {
			wrong = append(wrong, fmt.Sprintf("%s: %s is missing", where, key))
		}
	}
	for key, e := range v {
		of, ok := properties[key].(map[string]any)
		if !ok && others == nil && properties != nil {
			wrong = append(wrong, where+": "+key+" is not described")
		}
		if !ok {
			of = others
		}
		wrong = append(wrong, d.check(where+"."+key, of, e)...)
	}
	return wrong
}

// answer checks a body against what the operation promises.
func (d description) answer(t *testing.T, method, path string, status int, body []byte) {
	t.Helper()
	bare, _, _ := strings.Cut(path, "?")
	op, ok := d.Paths[bare][strings.ToLower(method)]
	if !ok {
		t.Errorf("%s %s is not described", method, bare)
		return
	}
	response, ok := op.Responses[fmt.Sprint(status)]
	if !ok {
		response = op.Responses["default"]
		if status < 300 {
			t.Errorf("%s %s answers %d, which is not described: %s", method, path, status, body)
		}
	}
	schema := response.Content["application/json"].Schema
	if len(response.Content) == 0 && len(body) == 0 {
		return
	}
	var v any
	if err := json.Unmarshal(body, &v); err != nil {
		t.Errorf("%s %s: %v", method, path, err)
		return
	}
	for _, w := range d.check(method+" "+path, schema, v) {
		t.Error(w)
	}
}

// described is a coordinator with everything it can serve.
func described(t *testing.T) (*secureNode, func(method, path, body string) (int, []byte), description) {
	path := filepath.Join(t.TempDir(), "coordinator.db")
	n := startSecure(t, openStore(t, path), path, func(_ *pki.Options, o *coordinator.Options) { o.LogLevel = new(logging.Level) })
	transport := &http.Transport{DialContext: dialSocket(filepath.Join(n.dir, coordinator.SocketFile))}
	t.Cleanup(transport.CloseIdleConnections)
	ask := func(method, path, body string) (int, []byte) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, "http://localhost"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := (&http.Client{Transport: transport}).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, b
	}
	var d description
	status, body := ask(http.MethodGet, api.PathOpenAPI, "")
	if err := json.Unmarshal(body, &d); err != nil || status != http.StatusOK {
		t.Fatalf("%d, %v: %s", status, err, body)
	}
	return n, ask, d
}

// TestOpenAPI: every route is described, nothing else is, and real answers are what
// the description says.
func TestOpenAPI(t *testing.T) {
	n, ask, d := described(t)
	if d.OpenAPI != "3.1.0" || d.Info.Version != "test" || d.Info.Title == "" {
		t.Errorf("%+v", d.Info)
	}
	var listed []string
	for path, item := range d.Paths {
		for method, op := range item {
			listed = append(listed, strings.ToUpper(method)+" "+path)
			if op.Summary == "" || op.Role == "" || len(op.Responses) < 2 {
				t.Errorf("%s %s: %+v", method, path, op)
			}
		}
	}
	served := n.Routes()
	slices.Sort(listed)
	slices.Sort(served)
	if !slices.Equal(listed, served) {
		t.Errorf("described:\n%s\nserved:\n%s", strings.Join(listed, "\n"), strings.Join(served, "\n"))
	}
	if op := d.Paths[api.PathRegister]["post"]; op.Role != "agent, for itself" {
		t.Errorf("who may register: %q", op.Role)
	}

	p := n.agent(t, "host")
	req := request("host", "10.0.0.1", "mesos", "docker")
	req.Instance = "i"
	lease, err := p.Register(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	named := containerOf(lease, 0)
	if _, err := p.ReportAttachments(t.Context(), api.AttachmentReport{AgentID: "host", Instance: "i", Sequence: 1, Snapshot: true, Put: []api.Attachment{named}, Usage: usageOf(lease, 1, 1)}); err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, c := range []struct{ method, path, body string }{
		{"GET", api.PathMasterState, ""}, {"GET", api.PathAgents, ""}, {"GET", api.PathOverlays, ""}, {"GET", api.PathReserved, ""},
		{"GET", api.PathContainers, ""}, {"GET", api.PathContainers + "?q=zzz", ""}, {"GET", api.PathContainers + "?limit=none", ""}, {"GET", api.PathAddresses, ""},
		{"GET", api.PathHealth, ""}, {"GET", api.PathReady, ""}, {"GET", api.PathLogLevel, ""}, {"GET", api.PathTokens, ""}, {"GET", api.PathCA, ""}, {"GET", api.PathWhoami, ""},
		{"GET", api.PathOpenAPI, ""},
		{"POST", api.PathRegister, encodeJSON(req)}, {"POST", api.PathRegister, "{}"}, {"POST", api.PathStatus, `{"agent_id": "host", "overlays": {}}`},
		{"POST", api.PathTokens, `{"role": "agent", "ttl_seconds": 60, "uses": 1}`}, {"POST", api.PathLogLevel, `{"level": "debug"}`},
		{"POST", api.PathOverlaysPlan, `{"config": "vtep_subnet: 44.128.0.0/20"}`},
		{"POST", api.PathOverlaysPlan, encodeJSON(api.ConfigRequest{Config: seedNetwork})}, {"POST", api.PathOverlaysDrain, `{"name": "dcos"}`},
		{"POST", api.PathPrune, `{"not_seen_seconds": 100000}`}, {"POST", api.PathCARotate, `{}`}, {"POST", api.PathAgentsDelete, `{"agents": ["host"]}`},
		{"POST", api.PathAgentsDelete, `[]`}, {"POST", api.PathReservedDrop, `{"all": true}`},
	} {
		status, body := ask(c.method, c.path, c.body)
		d.answer(t, c.method, c.path, status, body)
		checked++
	}
	t.Logf("%d operations described, %d answers checked", len(listed), checked)
}

// TestOpenAPIStreams: lines and events are what the description says.
func TestOpenAPIStreams(t *testing.T) {
	n, ask, d := described(t)
	p := n.agent(t, "host")
	if _, err := p.Register(t.Context(), request("host", "10.0.0.1")); err != nil {
		t.Fatal(err)
	}
	_, body := ask(http.MethodGet, api.PathEvents+"?after=0&follow=false", "")
	events := 0
	for line := range bytes.Lines(body) {
		data, ok := bytes.CutPrefix(line, []byte("data: "))
		if !ok {
			continue
		}
		events++
		var v any
		if err := json.Unmarshal(data, &v); err != nil {
			t.Fatal(err)
		}
		for _, w := range d.check("event", d.Paths[api.PathEvents]["get"].Responses["200"].Content["text/event-stream"].Item, v) {
			t.Error(w)
		}
	}
	if events == 0 {
		t.Errorf("no events: %s", body)
	}
	bad := map[string]any{"id": 1.5, "time": "late", "kind": true, "more": 1}
	if wrong := d.check("event", d.Paths[api.PathEvents]["get"].Responses["200"].Content["text/event-stream"].Item, bad); len(wrong) != 5 {
		t.Errorf("of an event that is wrong in five ways: %v", wrong)
	}
}
