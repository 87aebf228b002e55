package document

import (
	"encoding"
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
)

// fill gives every field that v has, at any depth, a value of its own that is
// not zero: lists get two elements.
func fill(t *testing.T, v reflect.Value, n *int) {
	*n++
	switch p := v.Addr().Interface().(type) {
	case *json.RawMessage:
		*p = json.RawMessage(`{"a":[1,{"b":true}]}`)
		return
	case encoding.TextUnmarshaler:
		text := map[string]string{"Addr": "9.0.0.1", "Prefix": "9.0.1.0/24", "MAC": "70:b3:d5:80:00:01"}[v.Type().Name()]
		if err := p.UnmarshalText([]byte(text)); err != nil {
			t.Fatalf("%s: %v", v.Type(), err)
		}
		return
	}
	if v.Type() == reflect.TypeFor[conf.Isolation]() {
		v.Set(reflect.ValueOf(conf.IsolationStrict))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(t, v.Field(i), n)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem(), n)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		fill(t, v.Index(0), n)
		fill(t, v.Index(1), n)
	case reflect.String:
		v.SetString("text-" + strings.Repeat("x", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint64:
		v.SetUint(uint64(*n))
	default:
		t.Fatalf("a field of type %s: teach this test and the scanner", v.Type())
	}
}

// A field that is missing in the scanner's lists would be read as absent.
func TestScannerKnowsEveryField(t *testing.T) {
	var want conf.NetConf
	fill(t, reflect.ValueOf(&want).Elem(), new(int))
	text, err := json.MarshalIndent(want, " ", "\t")
	if err != nil {
		t.Fatal(err)
	}
	var plain, scanned conf.NetConf
	if err := json.Unmarshal(text, &plain); err != nil {
		t.Fatal(err)
	}
	if !scanConf(text, &scanned) {
		t.Fatalf("the scanner gave up on\n%s", text)
	}
	if diff := cmp.Diff(plain, scanned); diff != "" {
		t.Errorf("configuration: encoding/json -, scanner +\n%s", diff)
	}

	var wantState, plainState, scannedState conf.State
	fill(t, reflect.ValueOf(&wantState).Elem(), new(int))
	if text, err = json.Marshal(wantState); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &plainState); err != nil {
		t.Fatal(err)
	}
	if !scanState(text, &scannedState) {
		t.Fatalf("the scanner gave up on\n%s", text)
	}
	if diff := cmp.Diff(plainState, scannedState, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("state: encoding/json -, scanner +\n%s", diff)
	}
}

// edgeCases are texts at the edge of what the scanner reads.
var edgeCases = []string{
	``, ` `, `{`, `{}`, ` {} `, "\t{\r\n}\n", `{}{}`, `{},`, `[]`, `null`, `"x"`, `0`, `{]`, `{,}`, `{"name"}`, `{"name":}`, `{"name":"a",}`, `{"name":"a" "mtu":1}`,
	`{"name":"a","name":"b"}`, `{"name":"a","NAME":"b"}`, `{"NAME":"b"}`, `{"x":1,"X":2}`, `{"x":{"y":1,"Y":2}}`, `{"x":{"y":1,"y":2}}`,
	`{"prevResult":{"y":1,"Y":2}}`, `{"prevResult":null}`, `{"prevResult": {"a" : 1 } }`, `{"prevResult":7}`, `{"prevResult":}`,
	`{"name":null}`, `{"name":7}`, `{"name":"a\u0041"}`, `{"name":"ä"}`, `{"n\u0061me":"x"}`, "{\"name\":\"\xff\"}", "{\"name\":\"a\nb\"}", `{"name":"a\"b"}`, "{\"\u017f\":1}", "{\"\u212a\":1,\"k\":1}",
	`{"mtu":1}`, `{"mtu":-1}`, `{"mtu":-0}`, `{"mtu":01}`, `{"mtu":-01}`, `{"mtu":-}`, `{"mtu":+1}`, `{"mtu":1.0}`, `{"mtu":1e3}`, `{"mtu":"1"}`, `{"mtu":9223372036854775807}`, `{"mtu":9223372036854775808}`, `{"mtu":1x}`, `{"mtu":0x1}`,
	`{"x":1.5}`, `{"x":1e99}`, `{"x":123456789012345678901}`, `{"x":tru}`, `{"x":true}`, `{"x":truefalse}`, `{"x":null}`, `{"x":nul}`, `{"x":[1,]}`, `{"x":[]}`, `{"x":[,]}`, `{"x":[1 2]}`,
	`{"hairpinMode":true}`, `{"hairpinMode":false}`, `{"hairpinMode":"true"}`, `{"hairpinMode":null}`,
	`{"ipam":{}}`, `{"ipam":[]}`, `{"ipam":null}`, `{"ipam":{"type":"x","TYPE":"y"}}`, `{"ipam":{"type":1}}`,
	`{"runtimeConfig":{"ips":[]}}`, `{"runtimeConfig":{"ips":null}}`, `{"runtimeConfig":{"ips":["9.0.0.1",1]}}`, `{"runtimeConfig":{"ips":"9.0.0.1"}}`,
	`{"runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":8080,"protocol":"tcp"},{}]}}`, `{"runtimeConfig":{"portMappings":[{"a":1,"A":1}]}}`, `{"runtimeConfig":{"portMappings":[null]}}`,
	`{"runtimeConfig":{"bandwidth":{"ingressRate":1000,"egressBurst":1}}}`, `{"runtimeConfig":{"bandwidth":null}}`, `{"runtimeConfig":{"bandwidth":7}}`,
	`{"args":{"org.apache.mesos":{"network_info":{"name":"dcos","ip_addresses":[{"protocol":"IPv4"}],"port_mappings":[{"host_port":1,"container_port":2}],"labels":{}}}}}`,
	`{"args":{"org.apache.mesos":{"network_info":{"labels":{"labels":[{"key":"name","value":"web"},{"key":"x"},{}]}}}}}`,
	`{"args":{"org.apache.mesos":{"network_info":null}}}`, `{"args":{"cni":{"ips":["9.0.0.1/25"]}}}`, `{"args":{"labels":[{"key":"a"},{"key":"b"}]}}`,
	`{"cni.dev/valid-attachments":[]}`, `{"cni.dev/valid-attachments":[{"containerID":"a","ifname":"b"}],"cni.dev/attachments":null}`, `{"cni.dev/valid-attachments":{}}`,
	`{"x":` + strings.Repeat("[", 63) + strings.Repeat("]", 63) + `}`, `{"x":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + `}`,
	`{"agent_id":"a","boot_id":"b","ip":"","lease":{"epoch":18446744073709551615}}`, `{"ip":"9.0.0.1","lease":{"epoch":-1}}`, `{"lease":{"epoch":-0}}`, `{"ip":"9.0.0"}`, `{"lease":{"epoch":1,"expires_boottime_ns":-5}}`,
	`{"overlays":[{"backend":{"vxlan":{"vtep_mac":"70:b3:d5:80:00:01","vtep_ip":""}},"info":{"name":"a","enabled":false},"mesos_bridge":{},"docker_bridge":null,"subnet":"9.0.0.0/24"}]}`,
	`{"overlays":[{"info":{"isolation":true}}]}`, `{"overlays":[{"info":{"isolation": false }}]}`, `{"overlays":[{"info":{"isolation":"none"}}]}`, `{"overlays":[{"info":{"isolation":"full"}}]}`,
	`{"overlays":[{"info":{"isolation":null}}]}`, `{"overlays":[{"info":{"isolation":1}}]}`, `{"overlays":[{"info":{"isolation":{}}}]}`, `{"overlays":[{"info":{"allow":["a"],"isolation":"strict"}}]}`,
	`{"overlays":[{"mesos_bridge":{"ip":"9.0.0.0/24"},"mesos_bridge":{"name":"x"}}]}`, `{"overlays":null}`, `{"overlays":[]}`, `{"overlays":[{"backend":{"vxlan":{"vtep_mac":"x"}}}]}`,
}

// FuzzScanner holds the scanner against encoding/json: what it accepts, that
// accepts as well, and reads the same from it.
func FuzzScanner(f *testing.F) {
	for _, s := range edgeCases {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var scanned, plain conf.NetConf
		// The keys of an object nobody reads may be anything, and "/" in them
		// makes Check take it for one that is read.
		if scanConf(b, &scanned) && !strings.Contains(strings.ReplaceAll(string(b), "cni.dev/", ""), "/") {
			if err := Check(b); err != nil {
				t.Fatalf("Check: %v", err)
			}
			if err := json.Unmarshal(b, &plain); err != nil {
				t.Fatalf("encoding/json: %v", err)
			}
			if !reflect.DeepEqual(plain, scanned) {
				t.Fatalf("encoding/json -, scanner +\n%s", cmp.Diff(plain, scanned))
			}
		}
		var scannedState, plainState conf.State
		if scanState(b, &scannedState) {
			if err := json.Unmarshal(b, &plainState); err != nil {
				t.Fatalf("encoding/json: %v", err)
			}
			if !reflect.DeepEqual(plainState, scannedState) {
				t.Fatalf("state: encoding/json %+v, scanner %+v", plainState, scannedState)
			}
		}
	})
}

// What Check accepts is JSON.
func FuzzCheck(f *testing.F) {
	for _, s := range []string{`{"cniVersion":"1.0.0","name":"a"}`, `{"a":[{"b":{}}]}`, `{"name":"a","NAME":"b"}`, `{`, `{"x":1e999}`, `[]`, "{\"\\u0000\":1}", `{"a":}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if Check(b) == nil && !json.Valid(b) {
			t.Errorf("accepted %q", b)
		}
	})
}
