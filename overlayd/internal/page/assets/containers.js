// The containers of the cluster, found by the coordinator.
import {h, fill, swatch} from './dom.js';
import {ago, clock, halfName, number, plural} from './format.js';
import {Pages} from './pages.js';
import {Table} from './table.js';
import {showAgent} from './agents.js';

const pause = 60; // ms between two questions while somebody types
const calm = 1000; // ms between two readings while containers come and go

export class Containers {
  constructor(model) {
    this.model = model;
    this.q = h('input', {type: 'search', id: 'containers-q', placeholder: 'id, name, address, overlay', autocomplete: 'off', spellcheck: 'false', oninput: () => this.typed()});
    this.overlay = h('select', {id: 'containers-overlay', onchange: () => this.typed()});
    this.agent = h('input', {type: 'search', id: 'containers-agent', placeholder: 'all', autocomplete: 'off', spellcheck: 'false', oninput: () => this.typed()});
    this.count = h('p', {class: 'muted count', role: 'status'});
    this.pages = new Pages((after, limit, signal) => model.get('/v1/containers?' + this.query({after, limit}), signal), () => this.came(), err => model.failed(err));
    this.table = new Table({
      label: 'Containers', class: 't-containers', onsort: () => {}, count: () => this.pages.total, item: i => this.pages.item(i), wants: (from, to) => this.pages.wants(from, to),
      signature: c => [c.agent_id, c.agent_ip, c.id, c.ifname, c.overlay, c.name, c.runtime, c.half, c.addresses, c.since].join('|'),
      empty: () => this.pages.known ? 'No container matches.' : 'Loading ...',
      columns: [
        {key: 'name', title: 'Container', cell: c => [h('span', {class: 'name', dir: 'auto'}, c.name || '(no name)'), h('span', {class: 'muted id', title: c.id}, short(c.id))]},
        {key: 'addresses', title: 'Addresses', cell: c => (c.addresses || []).map(a => h('span', {class: 'address'}, a))},
        {key: 'overlay', title: 'Overlay', cell: c => [swatch(model.colour(c.overlay)), ' ', c.overlay, ' ', h('span', {class: 'muted'}, halfName(c.half))]},
        {key: 'agent', title: 'Agent', cell: c => h('button', {type: 'button', class: 'link', onclick: () => showAgent(model, c.agent_id)}, c.agent_ip || c.agent_id)},
        {key: 'runtime', title: 'Runtime', cell: c => c.runtime || '-'},
        {key: 'since', title: 'Since', cell: c => h('span', {title: clock(c.since)}, ago(c.since))},
      ],
    });
    this.element = h('div', {class: 'view tall'}, h('h1', {}, 'Containers'),
      h('form', {class: 'bar-of-filters', role: 'search', onsubmit: e => e.preventDefault()},
        h('label', {for: 'containers-q'}, 'Find'), this.q, h('label', {for: 'containers-overlay'}, 'Overlay'), this.overlay,
        h('label', {for: 'containers-agent'}, 'Agent'), this.agent, this.count),
      this.table.element);
    this.options('');
  }

  query(more) {
    const query = new URLSearchParams();
    for (const [key, value] of Object.entries({q: this.q.value.trim(), overlay: this.overlay.value, agent: this.agent.value.trim(), ...more})) if (value) query.set(key, value);
    return query;
  }

  options(chosen) {
    const names = this.model.overlays.map(o => o.name);
    if (chosen && !names.includes(chosen)) names.push(chosen);
    fill(this.overlay, h('option', {value: ''}, 'all'), names.map(n => h('option', {value: n}, n)));
    this.overlay.value = chosen;
  }

  show(query) {
    this.q.value = query.get('q') || '';
    this.agent.value = query.get('agent') || '';
    this.options(query.get('overlay') || '');
    this.table.top();
    this.pages.load();
    this.table.draw();
  }

  // typed asks at once, and then not more often than somebody can read. The newest
  // question counts; those before it are given up.
  typed() {
    const query = this.query({});
    history.replaceState(null, '', '#/containers' + (query.size ? '?' + query : ''));
    if (this.waiting) return;
    const wait = Math.max(0, (this.asked || 0) + pause - performance.now());
    const ask = () => {
      this.waiting = 0;
      this.asked = performance.now();
      this.table.top();
      this.pages.load();
    };
    if (wait) this.waiting = setTimeout(ask, wait);
    else ask();
  }

  came() {
    const lacks = this.model.lacks();
    const count = plural(this.pages.total, 'container') + (lacks ? `, incomplete: ${lacks}` : '');
    if (this.count.textContent !== count) this.count.textContent = count;
    this.table.draw();
  }

  change(what) {
    if (what === 'usage' && this.pages.known) this.came();
    if (what === 'overlays') this.options(this.overlay.value);
    if (what === 'live' && this.model.live === 'on') this.pages.again();
  }

  events(fresh) {
    if (!fresh.some(e => e.kind.startsWith('container_') || e.kind === 'agent_gone') || this.later) return;
    const wait = Math.max(0, (this.read || 0) + calm - performance.now());
    this.later = setTimeout(async () => {
      await this.pages.again();
      this.read = performance.now();
      this.later = 0;
    }, wait);
  }
}

const short = id => id.length > 20 ? id.slice(0, 12) + '…' : id;
