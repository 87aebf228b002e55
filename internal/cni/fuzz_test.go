package cni

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"slices"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/conf/document"
	"overlayd.internal/overlay/ipam"
)

// results are texts that a plugin before us, or one that we run, may print.
var results = []string{
	`{}`, `null`, `5`, `""`, `[]`, `{`,
	`{"cniVersion":"0.2.0","ip4":{"ip":"9.0.1.2/25","gateway":"9.0.1.1","routes":[{"dst":"0.0.0.0/0"}]},"ip6":{"ip":"fd01::2/81"},"dns":{"nameservers":["9.9.9.9"]}}`,
	`{"cniVersion":"0.2.0","ip4":null,"ip6":{}}`, `{"cniVersion":"0.1.0","ip4":{"ip":"9.0.1.2"}}`,
	`{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","mac":"0a:58:09:00:01:02","sandbox":"/x"}],"ips":[{"version":"4","interface":0,"address":"9.0.1.2/25","gateway":"9.0.1.1"},{"version":"6","address":"fd01::2/81"}],"routes":[{"dst":"0.0.0.0/0","gw":"9.0.1.1"}],"dns":{}}`,
	`{"cniVersion":"1.0.0","interfaces":null,"ips":[{"address":"9.0.1.2/25","interface":-1}],"routes":null}`,
	`{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","mtu":1450,"socketPath":"/s","pciID":"p"}],"ips":[{"address":"9.0.1.2/25"},{"address":"9.0.1.3/25"}],"routes":[{"dst":"10.0.0.0/8","gw":"9.0.1.1","mtu":1400,"advmss":1,"priority":5,"table":100,"scope":253}]}`,
	`{"cniVersion":"1.1.0","interfaces":[null],"ips":[null],"routes":[null]}`, `{"cniVersion":"0.3.1","ips":[null]}`, `{"cniVersion":"0.2.0","ip4":{"routes":[{}]}}`,
	`{"cniVersion":"1.0.0","ips":[{}],"routes":[{}]}`, `{"cniVersion":"1.0.0","ips":[{"address":null}]}`, `{"cniVersion":"9.9.9"}`, `{"cniVersion":null}`, `{"cniVersion":5}`,
}

// FuzzPrevResult: whatever a runtime passes is a result without holes, or an
// error with a code.
func FuzzPrevResult(f *testing.F) {
	for _, s := range results {
		f.Add("1.0.0", []byte(s))
		f.Add("", []byte(s))
	}
	f.Fuzz(func(t *testing.T, version string, b []byte) {
		r, err := PrevResult(&Call{Conf: conf.NetConf{CNIVersion: version, PrevResult: b}})
		if err != nil {
			if e := asError(err); e.Code == ErrCodeInternal {
				t.Errorf("%q: an error without a code: %v", b, err)
			}
			return
		}
		checkWhole(t, b, r)
	})
}

// checkWhole: nobody who reads the result meets a nil.
func checkWhole(t *testing.T, b []byte, r *types100.Result) {
	t.Helper()
	if r != nil && (slices.Contains(r.IPs, nil) || slices.Contains(r.Interfaces, nil) || slices.Contains(r.Routes, nil)) {
		t.Errorf("%q: the result has a hole: %+v", b, r)
	}
}

// FuzzResultConvert: a result in each version is one JSON document, the same by
// both printers, and what it can hold survives the way back.
func FuzzResultConvert(f *testing.F) {
	for _, s := range results {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := PrevResult(&Call{Conf: conf.NetConf{PrevResult: b}})
		if err != nil || r == nil {
			return
		}
		for _, version := range supportedVersions {
			var out bytes.Buffer
			if err := printResult(&out, version, r); err != nil {
				continue // it cannot be expressed
			}
			converted, err := ForVersion(r, version).GetAsVersion(version)
			if err != nil {
				t.Fatal(err)
			}
			var plain bytes.Buffer
			if err := printJSON(&plain, converted); err != nil {
				t.Fatalf("%s: printed by one printer and not by the other: %v", version, err)
			}
			if diff := cmp.Diff(plain.String(), out.String()); diff != "" {
				t.Fatalf("%s: encoding/json -, ours +\n%s", version, diff)
			}
			if !json.Valid(out.Bytes()) {
				t.Fatalf("%s: not JSON: %s", version, out.Bytes())
			}
			back, err := PrevResult(&Call{Conf: conf.NetConf{CNIVersion: version, PrevResult: out.Bytes()}})
			if err != nil {
				continue // addresses that no version can hold: they were nothing to begin with
			}
			have, had := addressesOf(back), addressesOf(r)
			if version >= "0.3.0" && !slices.Equal(have, had) {
				t.Errorf("%s: %v became %v", version, had, have)
			}
			for _, a := range have {
				if !slices.Contains(had, a) {
					t.Errorf("%s: %v became %v", version, had, have)
				}
			}
		}
	})
}

func addressesOf(r *types100.Result) (out []netip.Prefix) {
	for _, ip := range r.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		bits, _ := ip.Address.Mask.Size()
		out = append(out, netip.PrefixFrom(a.Unmap(), bits))
	}
	return out
}

// FuzzGCList: a list keeps what it names, and no list keeps everything.
func FuzzGCList(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"cni.dev/valid-attachments":null}`, `{"cni.dev/valid-attachments":[]}`, `{"cni.dev/attachments":[]}`,
		`{"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}]}`, `{"cni.dev/valid-attachments":[{"containerID":"c1"}],"cni.dev/attachments":[]}`,
		`{"cni.dev/valid-attachments":[{},{"containerID":"c1","ifname":"eth0"},{"containerID":"c1","ifname":"eth0"}]}`, `{"cni.dev/valid-attachments":[null]}`,
		`{"cni.dev/valid-attachments":{"containerID":"c1"}}`, `{"cni.dev/valid-attachments":[["c1","eth0"]]}`,
	} {
		f.Add([]byte(s), "c1", "eth0")
	}
	f.Fuzz(func(t *testing.T, b []byte, id, ifname string) {
		c := &Call{}
		if malformed, err := document.ReadConf(b, &c.Conf); malformed != nil || err != nil {
			return
		}
		keep, err := GCKeep(c)
		if err != nil {
			if c.Conf.ValidAttachments != nil && c.Conf.LegacyValidAttachments == nil {
				t.Errorf("%s: %v", b, err)
			}
			return
		}
		if c.Conf.ValidAttachments == nil && c.Conf.LegacyValidAttachments == nil {
			t.Fatalf("%s: taken for a list", b)
		}
		list := c.Conf.ValidAttachments
		if list == nil {
			list = c.Conf.LegacyValidAttachments
		}
		old := ipam.Record{Attachment: conf.Attachment{Network: "n", ContainerID: id, IfName: ifname}, Since: conf.Boottime() - 2*gcAge}
		if listed := slices.Contains(*list, conf.ValidAttachment{ContainerID: id, IfName: ifname}); keep(old) != listed {
			t.Errorf("%s: %s/%s is listed: %v, kept: %v", b, id, ifname, listed, keep(old))
		}
		young := old
		young.Since = conf.Boottime()
		if !keep(young) {
			t.Errorf("%s: an attachment of this moment is not kept", b)
		}
	})
}
