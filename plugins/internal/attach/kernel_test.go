package attach

import (
	"net/netip"
	"testing"
	"time"

	"overlayd.internal/overlay/conf"
	"overlayd.internal/overlay/ipam"
	"overlayd.internal/overlay/ipam/veth"
	"overlayd.internal/overlay/plugins/internal/rtnl"
)

func BenchmarkConnect(b *testing.B) {
	host, container := newNamespace(b), newNamespace(b)
	host.addBridge(b, "m-dcos", 1450)
	att := ipam.Attachment{Network: "dcos", ContainerID: "c1", IfName: "eth0"}
	var steps [5]time.Duration
	for b.Loop() {
		host.inside(b, func() error {
			t0 := time.Now()
			s, err := openSandbox(container.path)
			if err != nil {
				return err
			}
			defer s.close()
			br, _, err := s.host.Find("m-dcos")
			if err != nil {
				return err
			}
			t1 := time.Now()
			addrs := []netip.Prefix{netip.MustParsePrefix("9.0.1.2/25")}
			p := pair{host: veth.Name(conf.Mesos, att.Key()), hostMAC: hostMAC(att.Key()), alias: "", bridge: "m-dcos", bridgeIdx: br.Index,
				hairpin: true, name: "eth0", mac: containerMAC(addrs), netns: int(s.netns.Fd()), mtu: 1450}
			s.host.Send(p.create(), p.mark())
			t2 := time.Now()
			peer, _, _ := s.inside.Find("eth0")
			if _, err := s.configure(p, peer.Index, addrs, []wantedRoute{{route: route{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr("9.0.1.1")}}}); err != nil {
				return err
			}
			t3 := time.Now()
			n := 0
			for ; ; n++ {
				l, _, _ := getLink(s.host, p.host)
				if l.port == portForwarding {
					break
				}
			}
			t4 := time.Now()
			if n > 0 {
				b.Logf("not at once: %d", n)
			}
			removeHost(s.host, p.host)
			t5 := time.Now()
			for i, d := range []time.Duration{t1.Sub(t0), t2.Sub(t1), t3.Sub(t2), t4.Sub(t3), t5.Sub(t4)} {
				steps[i] += d
			}
			return nil
		})
	}
	for i, s := range steps {
		b.ReportMetric(float64(s.Microseconds())/float64(b.N), []string{"open-us", "create-us", "config-us", "settle-us", "del-us"}[i])
	}
	_ = rtnl.Conn{}
}
