// The agents: a table to sort and filter, and a dialog about one of them.
import {h, fill, bar, badge, swatch, say} from './dom.js';
import {ago, clock, number, percent, plural, poolName} from './format.js';
import {health, findings} from './wrong.js';
import {Table} from './table.js';

const bases = new WeakMap(); // of agents; a reading makes new ones

// rowOf gathers what the table shows of an agent.
function rowOf(a, use) {
  if (!bases.has(a)) bases.set(a, base(a));
  return {...bases.get(a), used: use?.used || 0, cooling: use?.cooling || 0, total: use?.total || 0, level: use?.level || 'ok'};
}

function base(a) {
  const state = health(a);
  return {
    id: a.agent_id, ip: a.agent_ip, state, connected: a.connected, seen: a.last_seen, mtu: a.host?.mtu || a.vtep?.mtu || 0, version: a.version || '', datapath: a.host?.datapath || '',
    drift: a.host ? a.host.drift : null, ipKey: sortable(a.agent_ip),
    text: [a.agent_id, a.agent_ip, a.second_ip, a.version, a.host?.datapath, state.word, ...(a.overlays || []).flatMap(g => [g.subnet, g.subnet6])].join(' ').toLowerCase(),
  };
}

const order = {bad: 0, warning: 1, off: 2, ok: 3};

function byKey(key) {
  if (key === 'ip') return (a, b) => a.ipKey < b.ipKey ? -1 : a.ipKey > b.ipKey ? 1 : 0;
  if (key === 'health') return (a, b) => order[a.state.level] - order[b.state.level];
  if (key === 'seen') return (a, b) => (a.connected ? Infinity : Date.parse(a.seen) || 0) - (b.connected ? Infinity : Date.parse(b.seen) || 0) || 0;
  if (key === 'use') return (a, b) => (a.total ? a.used / a.total : 0) - (b.total ? b.used / b.total : 0);
  if (key === 'mtu' || key === 'drift') return (a, b) => (a[key] ?? -1) - (b[key] ?? -1);
  return (a, b) => a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0;
}

// sortable writes an address so that texts sort as addresses do.
const sortable = ip => ip.includes(':') ? '~' + ip : ip.split('.').map(n => n.padStart(3, '0')).join('.');

export class Agents {
  constructor(model) {
    this.model = model;
    this.list = [];
    this.filter = h('input', {type: 'search', id: 'agents-q', placeholder: 'id, address, version, subnet', autocomplete: 'off', spellcheck: 'false', oninput: () => this.route()});
    this.only = h('select', {id: 'agents-only', onchange: () => this.route()},
      [['', 'all'], ['ok', 'ok'], ['problems', 'with problems'], ['gone', 'not connected']].map(([value, text]) => h('option', {value}, text)));
    this.count = h('p', {class: 'muted count', role: 'status'});
    this.table = new Table({
      label: 'Agents', class: 't-agents', sort: {key: 'health', up: true}, onsort: () => this.change(), count: () => this.list.length, item: i => this.list[i],
      signature: r => [r.id, r.ip, r.state.word, r.connected ? '' : ago(r.seen), r.mtu, r.version, r.datapath, r.drift, r.used, r.total].join('|'),
      empty: () => this.model.loaded.has('agents') ? 'No agent matches.' : 'Loading ...',
      columns: [
        {key: 'id', title: 'Agent', sortable: true, cell: r => h('button', {type: 'button', class: 'link', onclick: () => showAgent(this.model, r.id)}, r.id)},
        {key: 'ip', title: 'Address', sortable: true, cell: r => r.ip},
        {key: 'health', title: 'Health', sortable: true, cell: r => badge(r.state.level, r.state.word)},
        {key: 'seen', title: 'Last seen', sortable: true, cell: r => r.connected ? 'now' : r.seen ? ago(r.seen) + ' ago' : 'never'},
        {key: 'mtu', title: 'MTU', sortable: true, cell: r => r.mtu || '-'},
        {key: 'version', title: 'Version', sortable: true, cell: r => r.version || '-'},
        {key: 'datapath', title: 'Datapath', sortable: true, cell: r => r.datapath || '-'},
        {key: 'drift', title: 'Drift', sortable: true, cell: r => r.drift === null ? '-' : number(r.drift)},
        {key: 'use', title: 'Addresses', sortable: true, cell: r => r.total ? [bar('Addresses of ' + r.id, r.used, r.cooling, r.total, r.level), h('span', {class: 'muted'}, percent(r.used, r.total))] : '-'},
      ],
    });
    this.element = h('div', {class: 'view tall'}, h('h1', {}, 'Agents'),
      h('form', {class: 'bar-of-filters', role: 'search', onsubmit: e => e.preventDefault()},
        h('label', {for: 'agents-q'}, 'Find'), this.filter, h('label', {for: 'agents-only'}, 'Show'), this.only, this.count),
      this.table.element);
  }

  show(query) {
    this.filter.value = query.get('q') || '';
    this.only.value = query.get('only') || '';
    this.change();
  }

  route() {
    const query = new URLSearchParams();
    if (this.filter.value) query.set('q', this.filter.value);
    if (this.only.value) query.set('only', this.only.value);
    history.replaceState(null, '', '#/agents' + (query.size ? '?' + query : ''));
    this.table.top();
    this.change();
  }

  change(what) {
    if (what === 'containers' || what === 'live' || what === 'overlays') return;
    const m = this.model;
    if (what !== undefined || !this.all || this.of !== m.agents) {
      const use = usageByAgent(m);
      this.all = m.agents.map(a => rowOf(a, use.get(a.agent_id)));
      this.of = m.agents;
    }
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean), only = this.only.value;
    this.list = this.all.filter(r => words.every(w => r.text.includes(w)) && (
      !only || only === 'ok' && r.state.level === 'ok' || only === 'gone' && !r.connected || only === 'problems' && r.state.level !== 'ok'));
    const {key, up} = this.table.sort, compare = byKey(key), sign = up ? 1 : -1;
    this.list.sort((a, b) => sign * compare(a, b) || (a.ipKey < b.ipKey ? -1 : a.ipKey > b.ipKey ? 1 : a.id < b.id ? -1 : 1));
    const count = `${number(this.list.length)} of ${plural(this.all.length, 'agent')}`;
    if (this.count.textContent !== count) this.count.textContent = count;
    this.table.draw();
  }
}

// usageByAgent sums up the halves of each agent.
function usageByAgent(m) {
  const use = new Map();
  for (const u of m.usage.agents) {
    const sum = use.get(u.agent_id);
    if (!sum) use.set(u.agent_id, {used: u.used, cooling: u.cooling, total: u.total, level: u.level});
    else {
      sum.used += u.used;
      sum.cooling += u.cooling;
      sum.total += u.total;
      if (u.level === 'full' || u.level === 'warning' && sum.level === 'ok') sum.level = u.level;
    }
  }
  return use;
}

// showAgent opens the dialog about one agent.
export function showAgent(model, id) {
  const a = model.byID.get(id);
  if (!a) {
    say(`The agent ${id} is no longer there.`);
    return;
  }
  const state = health(a), from = document.activeElement;
  const close = () => dialog.close();
  const row = (title, ...value) => [h('dt', {}, title), h('dd', {}, ...value)];
  const dialog = h('dialog', {class: 'about', 'aria-labelledby': 'about-title'},
    h('header', {}, h('h2', {id: 'about-title'}, a.agent_id), h('button', {type: 'button', class: 'plain', onclick: close}, 'Close')),
    h('p', {}, badge(state.level, state.word), ' ', a.connected ? 'connected' : a.last_seen ? `last seen ${ago(a.last_seen)} ago, at ${clock(a.last_seen)}` : 'never seen'),
    h('dl', {},
      row('Address', [a.agent_ip, a.second_ip].filter(Boolean).join(', ')), row('VTEP', [a.vtep?.ip, a.vtep?.ip6, a.vtep?.mac].filter(Boolean).join(', ')), row('MTU', a.host?.mtu || a.vtep?.mtu || 'not reported'),
      row('Version', a.version || 'not reported'), row('Datapath', a.host?.datapath || 'not reported'),
      row('Drift', a.host ? `${plural(a.host.drift, 'kernel object')} put back since the agent started` : 'not reported'),
      row('Lease', `epoch ${a.epoch}, term ${Math.round(a.term_seconds / 3600)} h`)),
    h('h3', {}, 'Subnets'),
    h('ul', {class: 'plain-list'}, (a.overlays || []).map(g => h('li', {}, swatch(model.colour(g.overlay.name)), ' ', g.overlay.name, ' ',
      [g.subnet, g.subnet6].filter(Boolean).map(p => h('a', {href: `#/map?overlay=${encodeURIComponent(g.overlay.name)}&at=${encodeURIComponent(p)}`, onclick: close}, p, ' ')), g.error || ''))),
    model.usage.agents.filter(u => u.agent_id === id).map(u => h('div', {class: 'fill'},
      h('p', {}, h('span', {}, `${u.overlay}, ${poolName(u.half)}`), h('span', {class: 'muted'}, `${number(u.used)} used, ${number(u.cooling)} cooling, ${number(u.free)} free`)),
      bar(`${u.overlay}, ${poolName(u.half)}`, u.used, u.cooling, u.total, u.level))),
    state.findings.length ? [h('h3', {}, 'What is wrong'), findings(state.findings)] : null,
    h('p', {}, h('a', {href: '#/containers?agent=' + encodeURIComponent(id), onclick: close}, 'Its containers')));
  dialog.addEventListener('close', () => { dialog.remove(); if (from?.isConnected) from.focus(); });
  document.body.append(dialog);
  dialog.showModal();
}
