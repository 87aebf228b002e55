// The page: views, which the address after # chooses, on one model.
import {h, fill, say} from './dom.js';
import {Model} from './model.js';
import {Overview} from './overview.js';
import {Agents} from './agents.js';
import {Containers} from './containers.js';
import {SpaceMap} from './map.js';
import {Events} from './events.js';

const model = new Model();
const makers = {overview: Overview, agents: Agents, containers: Containers, map: SpaceMap, events: Events};
const titles = {overview: 'Overview', agents: 'Agents', containers: 'Containers', map: 'Map of the address space', events: 'Events'};
const views = {};
const main = document.getElementById('main');
let view = null, name = '';

function go(event) {
  const [path, search] = location.hash.replace(/^#\/?/, '').split('?');
  const wanted = Object.hasOwn(makers, path) ? path : 'overview';
  const moved = wanted !== name;
  document.querySelectorAll('dialog').forEach(d => d.close());
  if (moved) {
    name = wanted;
    view?.hide?.();
    view = views[name] ||= new makers[name](model);
    fill(main, view.element);
    document.title = titles[name] + ' - Overlay network';
    for (const a of document.querySelectorAll('nav a')) {
      if (a.getAttribute('href') === '#/' + name) a.setAttribute('aria-current', 'page');
      else a.removeAttribute('aria-current');
    }
  }
  view.show(new URLSearchParams(search || ''));
  if (event && moved) {
    main.focus({preventScroll: true});
    say(titles[name]);
  }
}

function live() {
  const e = document.getElementById('live'), on = model.live === 'on';
  e.dataset.live = model.live;
  document.getElementById('live-text').textContent = on ? 'live' : 'not connected';
}

// A list of findings, and a table, are redrawn at most once for what comes together.
let pending = new Set();
model.addEventListener('change', e => {
  if (e.detail === 'live') live();
  if (!pending.size) setTimeout(() => { const all = pending; pending = new Set(); for (const what of all) view?.change(what); }, 0);
  pending.add(e.detail);
});
model.addEventListener('events', e => view?.events?.(e.detail));

const failed = document.getElementById('failed');
model.addEventListener('failed', e => {
  const err = e.detail;
  failed.hidden = !err;
  if (err) failed.textContent = err.status ? err.message : 'The coordinator does not answer; what is shown may be old.';
});

// The theme: the system's, or one that somebody chose.
const themes = ['system', 'light', 'dark'];
const button = document.getElementById('theme');
function theme(t) {
  if (t === 'system') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = t;
  fill(button, h('span', {}, 'Theme: '), t);
  view?.themed?.();
}
let chosen = themes.includes(localStorage.getItem('theme')) ? localStorage.getItem('theme') : 'system';
button.addEventListener('click', () => {
  chosen = themes[(themes.indexOf(chosen) + 1) % themes.length];
  localStorage.setItem('theme', chosen);
  theme(chosen);
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => view?.themed?.());

theme(chosen);
window.addEventListener('hashchange', go);
go();
model.start();
