package page

import (
	"encoding/json"
	"testing"
)

// TestSpace: the page's arithmetic of addresses, as the browser does it.
func TestSpace(t *testing.T) {
	c := startCoordinator(t)
	b := open(t, browser(t), 800, 600)
	b.visit(c.url + "/")
	got := eval[map[string]json.RawMessage](b, `(async () => {
		const s = await import('/page/space.js'), p = s.parse;
		const model = {
			agents: [
				{agent_id: 'a', agent_ip: '10.0.0.1', overlays: [{overlay: {name: 'x'}, subnet: '9.0.1.0/24', blocks: [{subnet: '9.0.0.0/24'}, {subnet: '9.0.7.0/24'}, {subnet: '9.0.9.0/24'}]}]},
				{agent_id: 'b', agent_ip: '10.0.0.2', overlays: [{overlay: {name: 'x'}, subnet: '9.0.2.0/24'}, {overlay: {name: 'gone'}, subnet: '11.0.0.0/24'}]},
			],
			usage: {agents: [
				{agent_id: 'a', overlay: 'x', half: 'mesos', used: 400, cooling: 8, total: 500, level: 'warning'}, {agent_id: 'a', overlay: 'x', half: 'docker', used: 0, cooling: 0, total: 500, level: 'ok'},
				{agent_id: 'b', overlay: 'x', half: 'mesos', used: 125, cooling: 0, total: 125, level: 'full'},
			]},
		};
		const all = s.spaces([{name: 'x', subnet: '9.0.0.0/16', prefix: 24}, {name: 'y', subnet: '9.4.0.0/16', prefix: 26, subnet6: 'fd01:b::/64', prefix6: 80}]);
		const blocks = s.blocks(model, all[0]);
		return {
			written: ['9.1.2.3/8', '9.0.0.5', 'fd01:b::2:8000:0:2/81', '::/0', '::1', 'fd01:0:0:1::/64', '1:2:3:4:5:6:7:8/128'].map(x => s.write(p(x))),
			none: ['', 'x', '9.0.0/8', '9.0.0.256', '9.0.0.0/33', '9.0.0.0/x', 'fd01::1::2', ':::', 'g::', null].map(x => p(x)),
			children: [0, 1, 255].map(i => s.write(s.child(p('9.0.0.0/8'), 8, i))).concat(s.write(s.child(p('fd01:b::/64'), 16, 65535))),
			places: [s.place(p('9.0.0.0/8'), 8, p('9.200.3.0/24')), s.place(p('9.0.1.0/24'), 1, p('9.0.1.128/25'))],
			holds: [s.holds(p('9.0.0.0/8'), p('9.255.0.0/16')), s.holds(p('9.0.0.0/8'), p('10.0.0.0/16')), s.holds(p('9.0.0.0/16'), p('9.0.0.0/8')), s.holds(p('::/0'), p('9.0.0.0/8'))],
			spaces: all.map(x => x.title + ' /' + x.leaf),
			blocks: blocks.map(x => [s.write(x.prefix), x.agent, x.used, x.cooling, x.total, x.level].join(' ')),
			trail: s.trail(all[0], p('9.0.1.0/25'), blocks).map(s.write),
		};
	})()`)
	for name, want := range map[string]string{
		"written":  `["9.0.0.0/8","9.0.0.5/32","fd01:b::2:8000:0:0/81","::/0","::1/128","fd01:0:0:1::/64","1:2:3:4:5:6:7:8/128"]`,
		"none":     `[null,null,null,null,null,null,null,null,null,null]`,
		"children": `["9.0.0.0/16","9.1.0.0/16","9.255.0.0/16","fd01:b:0:0:ffff::/80"]`,
		"places":   `[200,1]`,
		"holds":    `[true,false,false,false]`,
		"spaces":   `["x, 9.0.0.0/16 /24","y, 9.4.0.0/16 /26","all of IPv4, 9.0.0.0/13 /26","y, fd01:b::/64 /80"]`,
		"blocks":   `["9.0.0.0/24 a 100 2 250 warning","9.0.1.0/24 a 100 2 250 warning","9.0.2.0/24 b 125 0 125 full","9.0.7.0/24 a 100 2 250 warning","9.0.9.0/24 a 100 2 250 warning"]`,
		"trail":    `["9.0.0.0/16","9.0.1.0/24","9.0.1.0/25"]`,
	} {
		if string(got[name]) != want {
			t.Errorf("%s is %s, want %s", name, got[name], want)
		}
	}
}
