// A list of which the coordinator gives a part at a time, each after the end of the
// one before. It is kept in pages; a far one is come by through those in between,
// many at once, and what is far from sight is forgotten.

export const pageSize = 100;
const most = 10000; // rows at once
const keep = 200; // pages

export class Pages {
  // fetch(after, limit, signal) gives {total, next, containers}; changed() is called
  // when something has come; failed(err) when not.
  constructor(fetch, changed, failed) {
    Object.assign(this, {fetch, changed, failed, total: 0, known: false, round: 0});
    this.reset();
  }

  reset() {
    this.stop?.abort();
    this.stop = new AbortController();
    this.pages = new Map();
    this.after = new Map([[0, '']]); // what a page comes after, of those of which it is known
    this.end = Infinity; // the page behind the last
    this.from = this.until = 0; // the pages in sight
    this.busy = false;
    this.round++;
  }

  // load begins anew, and keeps what there is until the first page has come.
  async load() {
    const first = this.pages.get(0);
    this.reset();
    if (first) this.pages.set(0, first);
    await this.read(0, 0);
  }

  item(i) {
    return this.pages.get(Math.floor(i / pageSize))?.[i % pageSize];
  }

  // wants has the pages with the rows from one to another fetched.
  wants(from, to) {
    this.from = Math.floor(from / pageSize);
    this.until = Math.floor(Math.max(from, to - 1) / pageSize);
    if (!this.busy) this.next();
  }

  // next fetches the first page in sight that is missing.
  next() {
    for (let p = this.from; p <= this.until && p < this.end; p++) {
      if (this.pages.has(p) || p * pageSize >= this.total) continue;
      this.read(this.near(p), p);
      return;
    }
  }

  // near is the last page up to p of which it is known what it comes after.
  near(p) {
    let best = 0;
    for (const known of this.after.keys()) if (known <= p && known > best) best = known;
    return best;
  }

  // read fetches from one page to another, or as much of that as comes at once.
  async read(page, to) {
    const round = this.round, limit = Math.min(most, (to - page + 1) * pageSize);
    this.busy = true;
    try {
      const answer = await this.fetch(this.after.get(page), limit, this.stop.signal);
      if (round !== this.round) return;
      this.take(page, limit / pageSize, answer);
      this.changed();
    } catch (err) {
      if (round === this.round && err.name !== 'AbortError') this.failed(err);
      return;
    } finally {
      if (round === this.round) this.busy = false;
    }
    this.next();
  }

  take(page, count, answer) {
    const rows = answer.containers || [];
    this.total = answer.total;
    this.known = true;
    for (let i = 0; i < count && (i === 0 || i * pageSize < rows.length); i++) this.pages.set(page + i, rows.slice(i * pageSize, (i + 1) * pageSize));
    if (answer.next) {
      this.after.set(page + count, answer.next);
      if (this.end <= page + count) this.end = Infinity;
    } else {
      this.end = page + Math.max(1, Math.ceil(rows.length / pageSize));
      for (const p of this.pages.keys()) if (p >= this.end) this.pages.delete(p);
      for (const p of this.after.keys()) if (p >= this.end) this.after.delete(p);
    }
    this.forget();
  }

  // again reads the pages in sight anew, and forgets the others.
  async again() {
    const round = this.round, {from, until} = this;
    for (const p of this.pages.keys()) if (p < from || p > until) this.pages.delete(p);
    for (let p = from; p <= until && p < this.end && round === this.round && !this.busy; p++) await this.read(this.near(p), p);
  }

  forget() {
    if (this.pages.size <= keep) return;
    const far = [...this.pages.keys()].sort((a, b) => Math.abs(b - this.from) - Math.abs(a - this.from));
    for (const p of far.slice(0, this.pages.size - keep)) this.pages.delete(p);
  }
}
