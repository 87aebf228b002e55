// What happens, as it happens.
import {h, fill} from './dom.js';
import {clock, number, plural} from './format.js';
import {kinds} from './model.js';
import {Table} from './table.js';

const bad = new Set(['agent_gone', 'agent_disconnected', 'addresses_full', 'problem_begun']);
const warn = new Set(['addresses_warning']);
const words = kind => kind.replaceAll('_', ' ');
const levelOf = kind => bad.has(kind) ? 'bad' : warn.has(kind) ? 'warning' : 'ok';

// line is an event in one line.
export function line(e) {
  return [h('time', {datetime: e.time, class: 'muted'}, clock(e.time)), ' ', h('span', {class: 'kind', 'data-level': levelOf(e.kind)}, words(e.kind)), ' ', h('span', {class: 'event-text', dir: 'auto'}, e.text)];
}

export class Events {
  constructor(model) {
    this.model = model;
    this.list = [];
    this.held = false;
    this.kind = h('select', {id: 'events-kind', onchange: () => this.change()}, h('option', {value: ''}, 'all'), kinds.map(k => h('option', {value: k}, words(k))));
    this.q = h('input', {type: 'search', id: 'events-q', placeholder: 'agent, container, text', autocomplete: 'off', spellcheck: 'false', oninput: () => this.change()});
    this.hold = h('button', {type: 'button', class: 'plain', 'aria-pressed': 'false', onclick: () => this.toggle()}, 'Hold');
    this.count = h('p', {class: 'muted count'});
    this.table = new Table({
      label: 'Events, the newest first', class: 't-events', onsort: () => {}, count: () => this.list.length, item: i => this.list[this.list.length - 1 - i], signature: e => e.id,
      empty: () => 'No event matches. Events come as they happen.',
      columns: [
        {key: 'time', title: 'Time', cell: e => h('time', {datetime: e.time}, clock(e.time))},
        {key: 'kind', title: 'What', cell: e => h('span', {class: 'kind', 'data-level': levelOf(e.kind)}, words(e.kind))},
        {key: 'text', title: 'Text', cell: e => h('span', {class: 'event-text', dir: 'auto', title: e.text}, e.text)},
        {key: 'agent', title: 'Agent', cell: e => e.agent_ip || e.agent_id || ''},
      ],
    });
    this.element = h('div', {class: 'view tall'}, h('h1', {}, 'Events'),
      h('form', {class: 'bar-of-filters', role: 'search', onsubmit: e => e.preventDefault()},
        h('label', {for: 'events-q'}, 'Find'), this.q, h('label', {for: 'events-kind'}, 'Kind'), this.kind, this.hold, this.count),
      this.table.element);
  }

  toggle() {
    this.held = !this.held;
    this.hold.setAttribute('aria-pressed', String(this.held));
    fill(this.hold, this.held ? 'Go on' : 'Hold');
    if (!this.held) this.change();
  }

  show(query) {
    if (query.get('q') !== null) this.q.value = query.get('q');
    this.change();
  }

  matches() {
    const q = this.q.value.toLowerCase().trim(), kind = this.kind.value;
    return e => (!kind || e.kind === kind) && (!q || [e.text, e.agent_id, e.agent_ip, e.container, e.overlay, ...(e.addresses || [])].join(' ').toLowerCase().includes(q));
  }

  change(what) {
    if (what !== undefined) return;
    this.list = this.model.events.filter(this.matches());
    this.draw();
  }

  events() {
    if (!this.held) this.change();
  }

  draw() {
    this.count.textContent = `${plural(this.list.length, 'event')}, ${number(this.model.seen)} received`;
    this.table.draw();
  }
}
