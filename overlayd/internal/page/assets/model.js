// What the page knows of the cluster: asked for once, and again after events.

import {plural} from './format.js';

const stream = '/v1/events';

// How long at least between two readings of the same thing. A large cluster's
// answers are large, so a reading also rests for twenty times as long as it took.
const rest = 2000, restFactor = 20;
const kept = 5000; // events
// Who has gone, or has come after the coordinator was started, is not told at once, and
// not at all if it is over by then: so for how long, in ms, is read again who was missed.
const untold = 150000;

export class Model extends EventTarget {
  constructor() {
    super();
    this.agents = [];
    this.overlays = [];
    this.usage = {overlays: [], agents: [], incomplete: [], unreported: 0};
    this.containers = 0;
    this.events = []; // the newest last
    this.seen = 0; // events ever received
    this.loaded = new Set();
    this.live = 'off';
    this.incoming = [];
    this.readings = {
      agents: new Reading(() => this.get('/v1/agents'), list => { this.agents = list || []; this.index(); this.missing(); }, this),
      overlays: new Reading(() => this.get('/v1/overlays'), list => { this.overlays = list || []; }, this),
      usage: new Reading(() => this.get('/v1/addresses'), u => { this.usage = {overlays: u.overlays || [], agents: u.agents || [], incomplete: u.incomplete || [], unreported: u.unreported || 0}; }, this),
      containers: new Reading(() => this.get('/v1/containers?limit=1'), l => { this.containers = l.total; }, this, 500),
    };
    this.byID = new Map();
    this.told = new Map(); // agent id to the last event that said whether it is connected
    this.missed = new Map(); // agent id to when it was first seen not to be connected
  }

  // missing reads again while an agent is not connected and no event has said so, for
  // none will say then that it is back.
  missing() {
    const now = performance.now(), missed = new Map();
    let again = false;
    for (const a of this.agents) {
      if (a.connected || a.superseded) continue;
      const since = this.missed.get(a.agent_id) ?? now;
      missed.set(a.agent_id, since);
      again ||= this.told.get(a.agent_id) !== 'agent_disconnected' && now - since < untold;
    }
    this.missed = missed;
    if (again) this.readings.agents.want();
  }

  index() {
    this.byID = new Map(this.agents.map(a => [a.agent_id, a]));
  }

  // lacks says in a few words what containers and addresses are without, if anything.
  lacks() {
    const {incomplete, unreported} = this.usage;
    return [incomplete.length ? `${plural(incomplete.length, 'coordinator')} cannot be reached` : '', unreported ? `${plural(unreported, 'agent')} to report yet` : ''].filter(Boolean).join(', ');
  }

  // colour is the index of an overlay's colour: its place in the configuration.
  colour(overlay) {
    return Math.max(0, this.overlays.findIndex(o => o.name === overlay));
  }

  async get(path, signal) {
    const answer = await fetch(path, {signal, headers: {Accept: 'application/json'}, cache: 'no-store'});
    if (!answer.ok) {
      const said = await answer.json().catch(() => ({}));
      const why = said.error || answer.statusText || 'no reason given';
      throw Object.assign(new Error(`the coordinator answers ${answer.status}: ${why}`), {status: answer.status});
    }
    return answer.json();
  }

  start() {
    for (const r of Object.values(this.readings)) r.want();
    this.listen();
    setInterval(() => { if (!document.hidden) for (const r of Object.values(this.readings)) r.want(); }, 30000);
    setInterval(() => this.take(), 250);
    document.addEventListener('visibilitychange', () => { if (!document.hidden) for (const r of Object.values(this.readings)) r.want(); });
  }

  listen() {
    // What is remembered first. A browser that loses the stream goes on by itself.
    const last = this.events.length ? this.events[this.events.length - 1].id : 0;
    const s = new EventSource(stream + '?after=' + encodeURIComponent(last));
    s.onopen = () => this.setLive('on');
    s.onerror = () => {
      this.setLive('off');
      if (s.readyState === EventSource.CLOSED) setTimeout(() => this.listen(), 5000);
    };
    const got = m => this.incoming.push(m.data);
    for (const kind of kinds) s.addEventListener(kind, got);
    s.onmessage = got;
  }

  setLive(live) {
    if (live === this.live) return;
    this.live = live;
    this.tell('live');
    if (live === 'on') for (const r of Object.values(this.readings)) r.want(); // what happened in between
  }

  // take takes over the events that have come since the last time, at once.
  take() {
    if (!this.incoming.length) return;
    const raw = this.incoming;
    this.incoming = [];
    const fresh = [], old = new Set();
    for (const data of raw) {
      try {
        const e = JSON.parse(data);
        fresh.push(e);
        if (e.kind === 'agent_connected' || e.kind === 'agent_disconnected') this.told.set(e.agent_id, e.kind);
        for (const name of touches(e.kind)) old.add(name);
      } catch (err) {
        console.warn('an event cannot be read', err);
      }
    }
    for (const name of old) this.readings[name].want();
    this.seen += fresh.length;
    this.events = this.events.concat(fresh);
    if (this.events.length > kept) this.events = this.events.slice(-kept);
    this.dispatchEvent(new CustomEvent('events', {detail: fresh}));
  }

  tell(what) { this.dispatchEvent(new CustomEvent('change', {detail: what})); }

  failed(err) { this.dispatchEvent(new CustomEvent('failed', {detail: err})); }
}

export const kinds = ['agent_joined', 'agent_gone', 'agent_changed', 'agent_connected', 'agent_disconnected', 'container_attached', 'container_detached',
  'overlay_changed', 'addresses_warning', 'addresses_full', 'addresses_ok', 'problem_begun', 'problem_ended'];

// touches says what an event makes old.
function touches(kind) {
  if (kind.startsWith('container_')) return ['containers', 'usage'];
  if (kind.startsWith('addresses_')) return ['usage'];
  if (kind.startsWith('problem_')) return ['agents'];
  if (kind === 'agent_connected' || kind === 'agent_disconnected') return ['agents'];
  return ['agents', 'overlays', 'usage'];
}

// Reading asks for one thing whenever it is wanted, never twice at a time, and
// not too often.
class Reading {
  constructor(ask, take, model, least = rest) {
    Object.assign(this, {ask, take, model, least, wanted: false, busy: false, next: 0, timer: 0});
  }

  want() {
    this.wanted = true;
    if (this.busy || this.timer || document.hidden && this.next) return;
    this.timer = setTimeout(() => this.run(), Math.max(0, this.next - performance.now()));
  }

  async run() {
    this.timer = 0;
    this.busy = true;
    this.wanted = false;
    const began = performance.now();
    const name = Object.keys(this.model.readings).find(k => this.model.readings[k] === this);
    try {
      const answer = await this.ask();
      this.take(answer);
      this.model.loaded.add(name);
      this.model.failed(null);
      this.model.tell(name);
    } catch (err) {
      this.model.failed(err);
    }
    const took = performance.now() - began;
    this.next = performance.now() + Math.max(this.least, restFactor * took);
    this.busy = false;
    if (this.wanted) this.want();
  }
}
