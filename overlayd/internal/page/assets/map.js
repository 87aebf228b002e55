// A map of the address space: which agent has which block, how full it is, in the
// colour of its overlay; from the whole range to the addresses of a half. Beside
// it the same as a table.
import {h, fill, bar, swatch, say} from './dom.js';
import {capped, halfName, number, percent, plural, poolName} from './format.js';
import {parse, write, address, same, holds, child, place, spaces, blocks, step, trail} from './space.js';
import {draw, theme, zoom, copy} from './draw.js';
import {showAgent} from './agents.js';

export class SpaceMap {
  constructor(model) {
    this.model = model;
    this.choice = h('select', {id: 'map-space', onchange: () => this.go(this.spaces.find(s => s.key === this.choice.value).root)});
    this.crumbs = h('nav', {class: 'crumbs', 'aria-label': 'Place on the map'});
    this.canvas = h('canvas', {
      tabindex: 0, role: 'img', 'aria-describedby': 'map-keys', onkeydown: e => this.key(e), onclick: e => this.click(e), onmousemove: e => this.hover(e), onmouseleave: () => this.point(-1),
      onfocus: () => { if (this.active < 0) this.point(this.first()); }, onblur: () => this.point(-1),
    });
    this.told = h('p', {class: 'told'});
    this.table = h('div', {class: 'map-table'});
    this.element = h('div', {class: 'view map'}, h('h1', {}, 'Map'),
      h('form', {class: 'bar-of-filters', onsubmit: e => e.preventDefault()}, h('label', {for: 'map-space'}, 'Range'), this.choice, this.crumbs),
      h('div', {class: 'map-both'},
        h('div', {class: 'map-left'}, this.canvas, this.told,
          h('p', {class: 'muted', id: 'map-keys'}, 'Click, or arrow keys and Enter, to look closer; Escape to go back. A triangle in the corner: nearly full; a square: full. The table has the same.')),
        this.table));
    this.active = -1;
    this.halfContainers = null;
    new ResizeObserver(() => this.size()).observe(this.element);
  }

  show(query) {
    this.wanted = {overlay: query.get('overlay') || '', space: query.get('space') || '', at: query.get('at') || ''};
    this.change();
  }

  themed() { this.draw(); }

  change(what) {
    if (what === 'containers' || what === 'live') return;
    if (!this.model.loaded.has('overlays') || !this.model.loaded.has('agents')) {
      fill(this.table, h('p', {class: 'muted'}, 'Loading ...'));
      return;
    }
    this.spaces = spaces(this.model.overlays);
    if (!this.spaces.length) {
      fill(this.table, h('p', {class: 'muted'}, 'No overlay has a range.'));
      return;
    }
    const {overlay, space, at} = this.wanted, p = parse(at);
    this.space = this.spaces.find(s => s.key === space) || this.spaces.find(s => (!overlay || s.overlay === overlay) && (!p || holds(s.root, p))) || this.spaces[0];
    this.at = p && holds(this.space.root, p) ? p : this.space.root;
    const keys = this.spaces.map(s => s.key).join('|');
    if (keys !== this.keys) {
      this.keys = keys;
      fill(this.choice, this.spaces.map(s => h('option', {value: s.key}, s.title)));
    }
    this.choice.value = this.space.key;
    this.blocks = blocks(this.model, this.space);
    this.look();
  }

  // look makes the scene of where one is.
  look() {
    const block = this.blocks.find(b => holds(b.prefix, this.at));
    this.block = block;
    if (!block) this.scene = this.cells();
    else if (same(block.prefix, this.at) && !block.halves.some(u => u.half === 'shared')) this.scene = this.halves(block);
    else this.scene = this.half(block);
    this.scene.active = this.active = Math.min(this.active, this.scene.cells.length - 1);
    this.canvas.setAttribute('aria-label', `Map of ${write(this.at)}: ${this.scene.about}`);
    this.where();
    this.size();
    this.list();
  }

  // cells are the parts of a prefix that is no block: each empty, a block, or the
  // blocks in it as dots.
  cells() {
    const n = step(this.space, this.at, this.blocks), count = 2 ** n, cols = 2 ** Math.ceil(n / 2), cells = [];
    const inner = Math.max(0, Math.min(8, this.space.leaf - this.at.len - n)), dotCols = 2 ** Math.ceil(inner / 2), dotRows = 2 ** Math.floor(inner / 2);
    for (let i = 0; i < count; i++) {
      const prefix = child(this.at, n, i);
      const range = this.space.ranges.find(r => holds(r.root, prefix)) || this.space.ranges.find(r => holds(prefix, r.root));
      cells.push({prefix, kind: range ? 'free' : 'outside', colour: range?.colour, overlay: range?.overlay, blocks: [], dots: [], used: 0, cooling_: 0, total: 0, fill: 0, level: 'ok', label: short(prefix)});
    }
    for (const b of this.blocks) {
      if (!holds(this.at, b.prefix)) continue;
      const cell = cells[place(this.at, n, b.prefix)];
      cell.blocks.push(b);
      cell.used += b.used;
      cell.cooling_ += b.cooling;
      cell.total += b.total;
      cell.colour = b.colour;
      if (b.level === 'full' || b.level === 'warning' && cell.level === 'ok') cell.level = b.level;
      if (b.prefix.len <= cell.prefix.len) {
        Object.assign(cell, {kind: 'block', block: b, fill: part(b.used, b.total), cooling: part(b.cooling, b.total), note: [b.agent, b.ip]});
        continue;
      }
      cell.kind = 'part';
      const from = place(cell.prefix, inner, b.prefix);
      cell.dots.push({x: from % dotCols / dotCols, y: Math.floor(from / dotCols) / dotRows, w: 1 / dotCols, h: 1 / dotRows, colour: b.colour, fill: part(b.used, b.total)});
    }
    for (const c of cells) if (c.kind === 'part') c.note = [plural(c.blocks.length, 'agent')];
    const leased = cells.reduce((sum, c) => sum + c.blocks.length, 0);
    return {cols, rows: count / cols, cells, about: `${plural(count, 'part')}, ${plural(leased, 'block')} leased`};
  }

  // halves are those of one agent's block.
  halves(b) {
    const list = b.halves.length ? b.halves : [{half: '', used: b.used, cooling: b.cooling, total: b.total, level: b.level}];
    const cells = list.map(u => {
      const prefix = u.half === 'mesos' ? child(b.prefix, 1, 0) : u.half === 'docker' ? child(b.prefix, 1, 1) : b.prefix;
      return {prefix, kind: 'block', colour: b.colour, overlay: b.overlay, block: b, half: u, fill: part(u.used, u.total), cooling: part(u.cooling, u.total), level: u.level, used: u.used, cooling_: u.cooling, total: u.total,
        label: halfName(u.half) || 'block', note: [write(prefix) + (b.of > 1 ? `, one of ${b.of} blocks` : ''), `${number(u.used)} used`, `${number(u.cooling)} cooling`, `${capped(u.free ?? 0)} free`]};
    });
    cells.sort((x, y) => x.prefix.addr < y.prefix.addr ? -1 : 1);
    return {cols: cells.length, rows: 1, cells, about: `the block of ${b.agent} at ${b.ip}`};
  }

  // half is every address of a half; who has which is asked for.
  half(b) {
    const u = b.halves.find(x => x.half === 'shared' || x.half === (place(b.prefix, 1, this.at) === 0 ? 'mesos' : 'docker')) || {used: 0, cooling: 0, total: 0, level: 'ok'};
    const key = b.agent + ' ' + write(this.at) + ' ' + u.used;
    if (this.halfKey !== key) {
      this.halfKey = key;
      this.ask(b, key);
    }
    const size = this.at.bits - this.at.len, cells = [], have = new Map();
    for (const c of this.halfContainers || []) for (const a of c.addresses || []) {
      const p = parse(a);
      if (p && holds(this.at, p)) have.set(p.addr, c);
    }
    if (size > 10) {
      cells.push({prefix: this.at, kind: 'block', colour: b.colour, overlay: b.overlay, block: b, half: u, fill: part(u.used, u.total), cooling: part(u.cooling, u.total), level: u.level, used: u.used, cooling_: u.cooling, total: u.total, label: halfName(u.half)});
      return {cols: 1, rows: 1, cells, have, about: `the ${poolName(u.half)} of ${b.agent}`};
    }
    for (let i = 0; i < 2 ** size; i++) {
      const addr = this.at.addr | BigInt(i), c = have.get(addr), ends = i === 0 || i === 2 ** size - 1 && this.at.bits === 32;
      cells.push({prefix: {addr, len: this.at.bits, bits: this.at.bits}, kind: c ? 'address' : ends ? 'outside' : 'free', colour: b.colour, fill: c ? 1 : 0, level: 'ok', container: c, label: c ? last(addr, this.at.bits) : '',
        role: ends ? 'not given to containers' : i === 1 ? 'gateway' : ''});
    }
    const cols = 2 ** Math.ceil(size / 2);
    return {cols, rows: 2 ** size / cols, cells, have, about: `the addresses of the ${poolName(u.half)} of ${b.agent}; ${number(have.size)} used`};
  }

  async ask(b, key) {
    this.halfContainers = null;
    try {
      const query = new URLSearchParams({overlay: b.overlay, agent: b.agent, limit: 1000});
      const answer = await this.model.get('/v1/containers?' + query);
      if (this.halfKey !== key) return;
      this.halfContainers = answer.containers || [];
      this.look();
    } catch (err) {
      this.model.failed(err);
    }
  }

  // go shows another place.
  go(prefix, replace) {
    const query = new URLSearchParams({space: this.choice.value, at: write(prefix)});
    const space = this.spaces.find(s => s.key === this.choice.value);
    const before = this.scene && space === this.space ? copy(this.canvas) : null, from = this.at, was = this.scene;
    const hash = '#/map?' + query;
    if (replace) history.replaceState(null, '', hash);
    else history.pushState(null, '', hash);
    this.active = -1;
    this.show(query);
    if (document.activeElement === this.canvas) this.point(this.first());
    say(`${write(this.at)}: ${this.scene.about}`);
    this.animate(before, from, was);
  }

  animate(before, from, was) {
    if (!before || matchMedia('(prefers-reduced-motion: reduce)').matches) return;
    const inward = holds(from, this.at), scene = inward ? was : this.scene, inner = inward ? this.at : from;
    const i = scene.cells.findIndex(c => holds(c.prefix, inner));
    if (i < 0 || same(from, this.at)) return;
    const rect = {x: i % scene.cols / scene.cols, y: Math.floor(i / scene.cols) / scene.rows, w: 1 / scene.cols, h: 1 / scene.rows};
    this.drawNow();
    zoom(this.canvas, before, rect, inward, () => this.draw());
  }

  into(i) {
    const cell = this.scene.cells[i];
    if (!cell) return;
    if (cell.container) location.hash = '#/containers?q=' + encodeURIComponent(address(cell.prefix.addr, cell.prefix.bits));
    else if (cell.kind !== 'outside' && cell.kind !== 'address' && cell.prefix.len < cell.prefix.bits && !same(cell.prefix, this.at) && (cell.kind !== 'free' || cell.prefix.len < this.space.leaf)) {
      this.go(cell.block && !cell.half ? cell.block.prefix : cell.prefix);
    }
  }

  out() {
    const way = trail(this.space, this.at, this.blocks);
    if (way.length > 1) this.go(way[way.length - 2]);
  }

  first() {
    const i = this.scene.cells.findIndex(c => c.kind !== 'free' && c.kind !== 'outside');
    return Math.max(0, i);
  }

  key(e) {
    const {cols, cells} = this.scene || {cols: 1, cells: []};
    const steps = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -cols, ArrowDown: cols};
    if (e.key in steps) this.point(Math.min(cells.length - 1, Math.max(0, Math.max(0, this.active) + steps[e.key])), true);
    else if (e.key === 'Home') this.point(0, true);
    else if (e.key === 'End') this.point(cells.length - 1, true);
    else if (e.key === 'Enter' || e.key === '+') this.into(this.active);
    else if (e.key === 'Escape' || e.key === 'Backspace' || e.key === '-') this.out();
    else return;
    e.preventDefault();
  }

  cellAt(e) {
    const r = this.canvas.getBoundingClientRect(), {cols, rows} = this.scene;
    const x = Math.floor((e.clientX - r.left) / r.width * cols), y = Math.floor((e.clientY - r.top) / r.height * rows);
    return x >= 0 && y >= 0 && x < cols && y < rows ? y * cols + x : -1;
  }

  click(e) { if (this.scene) this.into(this.cellAt(e)); }

  hover(e) {
    if (!this.scene) return;
    const i = this.cellAt(e);
    if (i !== this.active) this.point(i);
  }

  point(i, aloud) {
    if (!this.scene) return;
    this.active = this.scene.active = i;
    const text = i >= 0 ? this.tell(this.scene.cells[i]) : '';
    fill(this.told, text);
    if (aloud) say(text);
    this.draw();
  }

  tell(c) {
    if (c.prefix.len === c.prefix.bits) {
      return address(c.prefix.addr, c.prefix.bits) + ': ' + (c.container ? `${c.container.name || c.container.id}, ${c.container.runtime || 'container'}` : c.role || 'free or cooling');
    }
    const where = write(c.prefix);
    if (c.kind === 'outside') return where + ': outside of every overlay';
    if (c.kind === 'free') return `${where}: ${c.overlay}, nothing leased`;
    const use = `${number(c.used)} of ${capped(c.total)} addresses used (${percent(c.used, c.total)})` + (c.cooling_ ? `, ${number(c.cooling_)} cooling` : '');
    if (c.block) return `${where}: ${c.block.overlay}, ${c.block.agent} at ${c.block.ip}, ${use}`;
    return `${where}: ${plural(c.blocks.length, 'agent')}, ${use}`;
  }

  where() {
    const way = trail(this.space, this.at, this.blocks);
    fill(this.crumbs, h('ol', {}, way.map((p, i) => h('li', {}, i === way.length - 1
      ? h('span', {'aria-current': 'location'}, write(p))
      : h('button', {type: 'button', class: 'link', onclick: () => this.go(p)}, write(p))))),
    this.block ? h('button', {type: 'button', class: 'link', onclick: () => showAgent(this.model, this.block.agent)}, 'look at ' + this.block.agent) : null);
  }

  // list is the scene as a table.
  list() {
    const rows = this.scene.have ? [...this.scene.have].sort((a, b) => a[0] < b[0] ? -1 : 1).map(([addr, c]) => [
      address(addr, this.at.bits), [h('span', {dir: 'auto'}, c.name || c.id)], c.runtime || '-', () => { location.hash = '#/containers?q=' + encodeURIComponent(c.id); }, c.id])
      : this.scene.cells.map((c, i) => ({c, i})).filter(({c}) => c.kind === 'block' || c.kind === 'part').map(({c, i}) => [
        write(c.prefix), [swatch(c.colour), ' ', c.half ? halfName(c.half.half) || c.block.agent : c.block ? `${c.block.agent}, ${c.block.ip}` : plural(c.blocks.length, 'agent')],
        [bar('Addresses of ' + write(c.prefix), c.used, c.cooling_, c.total, c.level), `${number(c.used)} of ${capped(c.total)}`], () => this.into(i), [c.used, c.cooling_, c.total, c.level, c.block?.agent]]);
    const signature = JSON.stringify(rows.map(r => [r[0], r[4]]));
    if (signature === this.listed) return;
    this.listed = signature;
    const had = this.table.contains(document.activeElement) ? document.activeElement.textContent : null;
    fill(this.table, !rows.length ? h('p', {class: 'muted'}, this.scene.have && !this.halfContainers ? 'Loading ...' : 'Nothing here is leased or used.') : h('table', {},
      h('caption', {class: 'unseen'}, `What is in ${write(this.at)}`),
      h('thead', {}, h('tr', {}, (this.scene.have ? ['Address', 'Container', 'Runtime'] : ['Block', this.block ? 'Half' : 'Agent', 'Used']).map(t => h('th', {scope: 'col'}, t)))),
      h('tbody', {}, rows.map(r => h('tr', {}, h('th', {scope: 'row'}, h('button', {type: 'button', class: 'link', onclick: r[3]}, r[0])), h('td', {}, r[1]), h('td', {}, r[2]))))));
    if (had) [...this.table.querySelectorAll('button')].find(b => b.textContent === had)?.focus({preventScroll: true});
  }

  size() {
    if (!this.scene) return;
    const width = this.canvas.clientWidth, square = width * this.scene.rows / this.scene.cols;
    this.canvas.style.height = Math.round(Math.max(Math.min(square, 640), Math.min(width, 240))) + 'px';
    this.draw();
  }

  // draw draws with the next frame, apart from what has changed the scene.
  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => { this.frame = 0; this.drawNow(); });
  }

  drawNow() {
    if (this.scene && this.canvas.isConnected && this.canvas.clientWidth) draw(this.canvas, this.scene, theme(this.canvas));
  }
}

const part = (n, of) => of > 0 ? Math.min(1, n / of) : 0;

// short is the part of a prefix in which it differs from those beside it.
function short(p) {
  const text = write(p);
  if (p.bits === 32) return text.split('/')[0].split('.').slice(0, Math.max(1, Math.ceil(p.len / 8))).slice(-2).join('.') ;
  return text.split('/')[0].replace(/::$/, '').split(':').slice(-1)[0] || text;
}

const last = (addr, bits) => bits === 32 ? '.' + (addr & 255n) : (addr & 0xffffn).toString(16);
