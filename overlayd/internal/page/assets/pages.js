// A list of which the coordinator gives one page at a time. A page is found by the
// one before it, so far ones are come by through those in between; what is far from
// sight is forgotten.

export const pageSize = 500;
const keep = 40; // pages

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
    this.after = ['']; // what each page comes after, as far as is known
    this.want = 0;
    this.busy = false;
    this.round++;
  }

  // load begins anew, and keeps what there is until the first page has come.
  async load() {
    const first = this.pages.get(0);
    this.reset();
    if (first) this.pages.set(0, first);
    await this.read(0);
  }

  item(i) {
    return this.pages.get(Math.floor(i / pageSize))?.[i % pageSize];
  }

  // wants has the pages from one row to another fetched.
  wants(from, to) {
    this.want = Math.floor(from / pageSize);
    this.until = Math.floor(Math.max(from, to - 1) / pageSize);
    if (!this.busy) this.next();
  }

  // next fetches the first page that is missing, or the last one that is on the way.
  next() {
    for (let p = this.want; p <= this.until; p++) {
      if (this.pages.has(p) || p * pageSize >= this.total) continue;
      const reachable = Math.min(p, this.after.length - 1);
      if (reachable < p && this.pages.has(reachable)) return; // there are fewer by now
      this.read(reachable);
      return;
    }
  }

  async read(page) {
    const round = this.round;
    this.busy = true;
    try {
      const answer = await this.fetch(this.after[page], pageSize, this.stop.signal);
      if (round !== this.round) return;
      this.total = answer.total;
      this.known = true;
      this.pages.set(page, answer.containers || []);
      this.after[page + 1] = answer.next || undefined;
      if (!answer.next) this.after.length = page + 1;
      this.forget();
      this.changed();
    } catch (err) {
      if (round === this.round && err.name !== 'AbortError') this.failed(err);
      return;
    } finally {
      if (round === this.round) this.busy = false;
    }
    this.next();
  }

  // again reads the pages in sight anew, and forgets the others.
  async again() {
    const round = this.round, from = this.want, until = this.until ?? from;
    for (const p of this.pages.keys()) if (p < from || p > until) this.pages.delete(p);
    for (let p = from; p <= until && round === this.round; p++) {
      if (this.after[p] !== undefined && !this.busy) await this.read(p);
    }
  }

  forget() {
    while (this.pages.size > keep) {
      let far = -1, distance = -1;
      for (const p of this.pages.keys()) {
        const d = Math.abs(p - this.want);
        if (d > distance) { far = p; distance = d; }
      }
      this.pages.delete(far);
    }
  }
}
