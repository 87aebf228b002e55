// Package openapi describes the coordinator's API in OpenAPI 3.1. The routes are a
// table, the schemas are made of the very types that are sent, so that they cannot
// say anything else.
package openapi

import (
	"encoding"
	"encoding/json"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/overlayd/internal/api"
)

// Operation is one route.
type Operation struct {
	Method, Path, Summary string
	Query                 []Param
	Request, Answer       any    // of the type of the JSON body; nil: there is none
	Kind                  string // content type of the answer where it is not JSON; then Answer is of one line or event
	Status                int    // of success; 0: 200
}

// Param is one parameter in the query.
type Param struct {
	Name, Description string
	Number            bool
}

type object = map[string]any

// Document is the description, as JSON. who says for whom an operation is; empty: it
// is not served.
func Document(version string, who func(method, path string) string) ([]byte, error) {
	s := schemas{components: object{}}
	paths := object{}
	for _, op := range Operations() {
		role := who(op.Method, op.Path)
		if role == "" {
			continue // this one does not serve it
		}
		item, _ := paths[op.Path].(object)
		if item == nil {
			item = object{}
			paths[op.Path] = item
		}
		item[strings.ToLower(op.Method)] = s.operation(op, role)
	}
	doc := object{
		"openapi": "3.1.0",
		"info": object{
			"title": "Coordinator of the overlay network", "version": version,
			"description": "HTTP/1.1 and JSON. Clients show a certificate of the cluster, over TLS 1.3; x-role says which role an operation needs. " +
				"An answer that is not 2xx has the body Error. Further keys may be added to what is answered.",
		},
		"paths":      paths,
		"components": object{"schemas": s.components, "securitySchemes": object{"certificate": object{"type": "mutualTLS"}}},
		"security":   []any{object{"certificate": []any{}}},
	}
	b, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("describe the API: %w", err)
	}
	return append(b, '\n'), nil
}

func (s schemas) operation(op Operation, role string) object {
	status := "200"
	if op.Status != 0 {
		status = fmt.Sprint(op.Status)
	}
	answer := object{"description": "it was done"}
	switch {
	case op.Kind != "" && op.Answer != nil:
		answer["content"] = object{op.Kind: object{"schema": object{"type": "string", "description": "a stream of " + s.name(reflect.TypeOf(op.Answer))}, "x-item": s.of(reflect.TypeOf(op.Answer))}}
	case op.Kind != "":
		answer["content"] = object{op.Kind: object{"schema": object{"type": "string"}}}
	case op.Answer != nil:
		answer["content"] = object{"application/json": object{"schema": s.of(reflect.TypeOf(op.Answer))}}
	}
	failure := object{"description": "it was refused, or failed; the sentence says why", "content": object{"application/json": object{"schema": s.of(reflect.TypeFor[api.Error]())}}}
	out := object{
		"summary": op.Summary, "x-role": role,
		"responses": object{status: answer, "default": failure},
	}
	if role == "public" {
		out["security"] = []any{}
	}
	if op.Request != nil {
		out["requestBody"] = object{"required": true, "content": object{"application/json": object{"schema": s.of(reflect.TypeOf(op.Request))}}}
	}
	var params []any
	for _, p := range op.Query {
		kind := "string"
		if p.Number {
			kind = "integer"
		}
		params = append(params, object{"name": p.Name, "in": "query", "description": p.Description, "schema": object{"type": kind}})
	}
	if params != nil {
		out["parameters"] = params
	}
	return out
}

// schemas makes schemas of types. Those of structures that have a name are
// components.
type schemas struct{ components object }

// name is a type's own, with its package where that is not api.
func (schemas) name(t reflect.Type) string {
	pkg := t.PkgPath()[strings.LastIndex(t.PkgPath(), "/")+1:]
	if pkg == "api" || pkg == "" {
		return t.Name()
	}
	return pkg + "." + t.Name()
}

func (s schemas) of(t reflect.Type) object {
	switch t {
	case reflect.TypeFor[time.Time]():
		return object{"type": "string", "format": "date-time"}
	case reflect.TypeFor[netip.Addr]():
		return object{"type": "string", "description": "IP address, or empty"}
	case reflect.TypeFor[netip.Prefix]():
		return object{"type": "string", "description": "IP address, slash, length of the prefix; or empty"}
	case reflect.TypeFor[conf.Half]():
		return object{"type": "string", "enum": []any{string(conf.Mesos), string(conf.Docker), string(conf.SharedPool)}}
	case reflect.TypeFor[json.RawMessage]():
		return object{}
	}
	if t.Implements(reflect.TypeFor[json.Marshaler]()) {
		return object{"type": []any{"string", "boolean", "object"}}
	}
	if t.Implements(reflect.TypeFor[encoding.TextMarshaler]()) {
		return object{"type": "string"}
	}
	switch t.Kind() {
	case reflect.Interface:
		return object{}
	case reflect.String:
		return object{"type": "string"}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Pointer:
		return s.of(t.Elem())
	case reflect.Slice, reflect.Array:
		if t.Elem().Kind() == reflect.Uint8 {
			return object{"type": "string", "contentEncoding": "base64"}
		}
		return object{"type": "array", "items": s.of(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": s.of(t.Elem())}
	case reflect.Struct:
		return s.structure(t)
	case reflect.Float32, reflect.Float64:
		return object{"type": "number"}
	default:
		return object{"type": "integer"}
	}
}

func (s schemas) structure(t reflect.Type) object {
	name := s.name(t)
	if name == "" {
		return s.fields(t)
	}
	if _, made := s.components[name]; !made {
		s.components[name] = nil // it may refer to itself
		s.components[name] = s.fields(t)
	}
	return object{"$ref": "#/components/schemas/" + name}
}

// fields is what encoding/json makes of a structure.
func (s schemas) fields(t reflect.Type) object {
	properties, required := object{}, []any{}
	for _, f := range reflect.VisibleFields(t) {
		tag, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && tag == "" || !f.IsExported() || tag == "-" {
			continue
		}
		if len(f.Index) > 1 && properties[tag] != nil {
			continue // the outer one counts
		}
		schema := s.of(f.Type)
		left := slices.ContainsFunc(strings.Split(options, ","), func(o string) bool { return o == "omitempty" || o == "omitzero" })
		if !left {
			required = append(required, tag)
			if k := f.Type.Kind(); (k == reflect.Slice || k == reflect.Map) && schema["type"] != nil {
				schema["type"] = []any{schema["type"], "null"}
			}
		}
		properties[tag] = schema
	}
	return object{"type": "object", "properties": properties, "required": required}
}
