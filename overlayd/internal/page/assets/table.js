// A table of any length of which only the rows in sight are in the document. It
// keeps the number and position of rows for screen readers.
import {h, add, fill} from './dom.js';

const beyond = 6; // rows kept above and below those in sight

export class Table {
  // label; columns [{key, title, cell(item), sortable}]; count(); item(i), which is
  // undefined while it is on its way; signature(item), which changes with what is
  // shown; empty, a text; onsort(key); wants(from, to)
  constructor(options) {
    this.o = options;
    this.rows = new Map(); // by index
    this.sort = options.sort || null;
    this.spacer = h('div', {class: 'vt-spacer', role: 'presentation'});
    this.body = h('div', {class: 'vt-body', role: 'rowgroup', tabindex: 0, 'aria-label': options.label + ', rows'}, this.spacer);
    this.head = h('div', {class: 'vt-head', role: 'rowgroup'});
    this.none = h('p', {class: 'vt-none muted', hidden: true});
    this.table = h('div', {class: 'vt ' + (options.class || ''), role: 'table', 'aria-label': options.label, 'aria-colcount': options.columns.length}, this.head, this.body);
    this.element = h('div', {class: 'vt-frame'}, this.table, this.none);
    this.header();
    this.body.addEventListener('scroll', () => this.later(), {passive: true});
    this.body.addEventListener('keydown', e => this.key(e));
    this.resized = new ResizeObserver(() => this.draw());
    this.resized.observe(this.body);
  }

  header() {
    const cells = this.o.columns.map((c, i) => {
      const sorted = this.sort && this.sort.key === c.key ? (this.sort.up ? 'ascending' : 'descending') : null;
      const title = c.sortable
        ? h('button', {type: 'button', class: 'sort', onclick: () => this.sortBy(c.key), 'data-column': c.key}, c.title, h('span', {'aria-hidden': 'true'}, sorted === 'ascending' ? ' ▴' : sorted ? ' ▾' : ''))
        : c.title;
      return h('div', {class: 'vt-th c-' + c.key, role: 'columnheader', 'aria-colindex': i + 1, 'aria-sort': sorted}, title);
    });
    const had = document.activeElement && this.head.contains(document.activeElement) ? document.activeElement.dataset.column : null;
    fill(this.head, h('div', {class: 'vt-row', role: 'row', 'aria-rowindex': 1}, cells));
    if (had) this.head.querySelector(`[data-column="${had}"]`)?.focus();
  }

  sortBy(key) {
    this.sort = {key, up: this.sort && this.sort.key === key ? !this.sort.up : true};
    this.header();
    this.o.onsort(this.sort);
  }

  height() {
    return parseFloat(getComputedStyle(this.element).getPropertyValue('--row')) || 40;
  }

  later() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  top() {
    this.body.scrollTop = 0;
  }

  // draw puts the rows in sight into the document, and those out of sight out of
  // it, but for one that has the focus.
  draw() {
    const count = this.o.count(), height = this.height();
    if (height !== this.was) {
      for (const row of this.rows.values()) row.element.remove();
      this.rows.clear();
      this.was = height;
    }
    this.table.setAttribute('aria-rowcount', count + 1);
    this.none.hidden = count > 0;
    this.table.hidden = count === 0;
    if (count === 0) fill(this.none, this.o.empty());
    this.spacer.style.height = count * height + 'px';
    const sight = this.body.clientHeight || 400;
    const from = Math.max(0, Math.floor(this.body.scrollTop / height) - beyond);
    const to = Math.min(count, Math.ceil((this.body.scrollTop + sight) / height) + beyond);
    this.o.wants?.(from, to);
    const focused = document.activeElement;
    for (const [i, row] of this.rows) {
      if (i >= from && i < to || i < count && row.element.contains(focused)) continue;
      row.element.remove();
      this.rows.delete(i);
    }
    for (let i = from; i < to; i++) this.row(i, height, focused);
  }

  row(i, height, focused) {
    const item = this.o.item(i);
    const signature = item === undefined ? undefined : this.o.signature(item);
    const was = this.rows.get(i);
    if (was && was.signature === signature) return;
    const held = was && was.element.contains(focused);
    const cells = this.o.columns.map((c, n) => {
      const cell = h('div', {class: 'vt-td c-' + c.key, role: 'cell', 'aria-colindex': n + 1});
      return item === undefined ? add(cell, n === 0 ? '...' : '') : add(cell, [c.cell(item)]);
    });
    const element = h('div', {class: 'vt-row', role: 'row', 'aria-rowindex': i + 2, 'data-index': i}, cells);
    element.style.transform = `translateY(${i * height}px)`;
    if (was) was.element.replaceWith(element);
    else this.place(i, element);
    this.rows.set(i, {element, signature});
    if (held) (element.querySelector('button, a') || this.body).focus({preventScroll: true});
  }

  // place keeps the rows of the document in the order in which they are seen.
  place(i, element) {
    let next = null, least = Infinity;
    for (const [n, row] of this.rows) {
      if (n > i && n < least) { least = n; next = row.element; }
    }
    this.spacer.insertBefore(element, next);
  }

  // key moves between rows with the arrow keys.
  key(e) {
    const step = {ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10}[e.key];
    const count = this.o.count();
    let to;
    const row = e.target.closest('[data-index]');
    if (e.key === 'Home' && row) to = 0;
    else if (e.key === 'End' && row) to = count - 1;
    else if (step && row) to = Math.min(count - 1, Math.max(0, Number(row.dataset.index) + step));
    else if (step && e.target === this.body) to = Math.floor(this.body.scrollTop / this.height());
    else return;
    e.preventDefault();
    this.show(to);
  }

  // show scrolls to a row and gives it the focus.
  show(i) {
    const height = this.height(), sight = this.body.clientHeight;
    if (i * height < this.body.scrollTop) this.body.scrollTop = i * height;
    else if ((i + 1) * height > this.body.scrollTop + sight) this.body.scrollTop = (i + 1) * height - sight;
    this.draw();
    this.rows.get(i)?.element.querySelector('button, a')?.focus({preventScroll: true});
  }

  stop() { this.resized.disconnect(); }
}
