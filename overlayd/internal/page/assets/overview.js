// The first view: how the cluster is, what is wrong, the overlays, what happened
// last.
import {h, fill, bar, badge, swatch} from './dom.js';
import {capped, number, percent, plural, poolName} from './format.js';
import {health, wrong, findings} from './wrong.js';
import {showAgent} from './agents.js';
import {line} from './events.js';

export class Overview {
  constructor(model) {
    this.model = model;
    this.tiles = h('ul', {class: 'tiles'});
    this.wrong = h('div', {});
    this.overlays = h('div', {class: 'cards'});
    this.last = h('ol', {class: 'last'});
    this.element = h('div', {class: 'view overview'},
      h('h1', {class: 'unseen'}, 'Overview'),
      this.tiles,
      h('section', {'aria-labelledby': 'h-wrong'}, h('h2', {id: 'h-wrong'}, 'What is wrong'), this.wrong),
      h('section', {'aria-labelledby': 'h-overlays'}, h('h2', {id: 'h-overlays'}, 'Overlays'), this.overlays),
      h('section', {'aria-labelledby': 'h-last'}, h('h2', {id: 'h-last'}, 'Latest events'), this.last));
  }

  show() { this.change(); this.events(); }

  change() {
    const m = this.model;
    if (m.loaded.has('agents')) {
      const list = wrong(m);
      const signature = list.map(f => f.what + f.evidence).join('\n');
      if (signature !== this.signature) {
        this.signature = signature;
        fill(this.wrong, findings(list, id => showAgent(m, id)));
      }
      this.drawTiles(list);
    }
    if (m.loaded.has('overlays')) this.drawOverlays();
  }

  drawTiles(list) {
    const m = this.model;
    let connected = 0, superseded = 0;
    for (const a of m.agents) {
      if (a.superseded) superseded++;
      else if (a.connected) connected++;
    }
    const all = m.agents.length - superseded;
    const used = m.usage.overlays.reduce((n, u) => n + u.used, 0), total = m.usage.overlays.reduce((n, u) => n + u.total, 0);
    const errors = list.filter(f => f.severity === 'error').length;
    const tile = (href, title, value, note, level) => h('li', {}, h('a', {class: 'tile', href, 'data-level': level}, h('span', {class: 'tile-title'}, title), h('strong', {}, value), h('span', {class: 'muted'}, note)));
    fill(this.tiles,
      tile('#/agents', 'Agents', number(all), connected === all ? 'all connected' : `${number(all - connected)} not connected`, connected === all ? 'ok' : 'bad'),
      tile('#/containers', 'Containers', number(m.containers), m.lacks() ? 'attached, and maybe more' : 'attached', m.lacks() ? 'warning' : 'ok'),
      tile('#/map', 'Addresses', percent(used, total), `${number(used)} of ${capped(total)} used`, 'ok'),
      tile('#/overview', 'Findings', number(list.length), errors ? plural(errors, 'error') : list.length ? 'warnings only' : 'nothing is wrong', errors ? 'bad' : list.length ? 'warning' : 'ok'));
  }

  drawOverlays() {
    const m = this.model;
    const use = new Map();
    for (const u of m.usage.overlays) {
      if (!use.has(u.overlay)) use.set(u.overlay, []);
      use.get(u.overlay).push(u);
    }
    fill(this.overlays, m.overlays.map((o, i) => this.card(o, i, use.get(o.name) || [])));
    if (!m.overlays.length) fill(this.overlays, h('p', {class: 'muted'}, 'No overlay is configured.'));
  }

  card(o, index, use) {
    const worst = use.some(u => u.level === 'full') ? 'full' : use.some(u => u.level === 'warning') ? 'warning' : 'ok';
    const pools = [[o.pool, o.subnet, o.prefix], [o.pool6, o.subnet6, o.prefix6]].filter(p => p[0]);
    return h('article', {class: 'card', 'data-overlay': o.name, 'aria-label': 'Overlay ' + o.name},
      h('h3', {}, swatch(index), ' ', h('a', {href: '#/map?overlay=' + encodeURIComponent(o.name)}, o.name), ' ', worst === 'ok' ? null : badge(worst, worst === 'full' ? 'full' : 'nearly full'),
        !o.configured ? badge('off', 'no longer configured') : o.enabled === false ? badge('off', 'disabled') : null),
      pools.map(([pool, range, prefix]) => h('div', {class: 'fill'},
        h('p', {}, h('span', {}, range), h('span', {class: 'muted'}, `${number(pool.used)} of ${capped(pool.total)} subnets /${prefix}`)),
        bar(`Agent subnets of ${o.name} in ${range}`, pool.used, 0, pool.total, pool.used >= pool.total ? 'full' : pool.used >= 0.8 * pool.total ? 'warning' : 'ok'))),
      use.map(u => h('div', {class: 'fill'},
        h('p', {}, h('span', {}, poolName(u.half)), h('span', {class: 'muted'}, `${number(u.used)} used, ${number(u.cooling)} cooling, ${capped(u.free)} free`)),
        bar(`Addresses of ${o.name}, ${poolName(u.half)}`, u.used, u.cooling, u.total, u.level))),
      h('p', {class: 'muted'}, plural(o.leases, 'lease'), use.length ? [', ', h('a', {href: '#/containers?overlay=' + encodeURIComponent(o.name)}, 'its containers')] : null));
  }

  events() {
    const latest = this.model.events.slice(-8).reverse();
    fill(this.last, latest.map(e => h('li', {}, line(e))));
    if (!latest.length) fill(this.last, h('li', {class: 'muted'}, 'Nothing has happened since the coordinator began to watch.'));
  }
}
