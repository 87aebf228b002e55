// Elements, made of text alone: what a container is called is somebody else's
// choice, so nothing here takes HTML.

// h makes an element. Keys of props: class, a property that begins with "on" for
// a listener, everything else an attribute; null and false leave it out.
export function h(tag, props, ...children) {
  const e = document.createElement(tag);
  for (const [key, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith('on')) e.addEventListener(key.slice(2), value);
    else e.setAttribute(key, value === true ? '' : String(value));
  }
  add(e, children);
  return e;
}

// add appends elements and texts.
export function add(e, children) {
  for (const c of [children].flat(Infinity)) {
    if (c === null || c === undefined || c === false) continue;
    e.append(c instanceof Node ? c : document.createTextNode(clean(String(c))));
  }
  return e;
}

// fill replaces what is in an element. The focus goes to what is in the place of what had it.
export function fill(e, ...children) {
  const had = document.activeElement, held = had && had !== e && e.contains(had);
  const like = () => [...e.querySelectorAll(had.tagName)].filter(x => had.hasAttribute('href') ? x.getAttribute('href') === had.getAttribute('href') : x.textContent === had.textContent);
  const place = held ? like().indexOf(had) : -1;
  e.replaceChildren();
  add(e, children);
  if (held) like().slice(0, place + 1).at(-1)?.focus({preventScroll: true});
  return e;
}

// say has a screen reader say something.
export function say(text) {
  document.getElementById('said').textContent = clean(text);
}

// clean shows control characters and those that turn the direction of text, which
// would make a name look like another one.
export function clean(text) {
  return text.replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, '\ufffd');
}

// bar is how full something is: used, cooling and free of total.
export function bar(label, used, cooling, total, level) {
  const part = n => total > 0 ? Math.min(100, 100 * n / total) : 0;
  const e = h('div', {
    class: 'bar', role: 'meter', 'aria-label': label, 'aria-valuemin': 0, 'aria-valuemax': Math.max(total, 1), 'aria-valuenow': Math.min(used, Math.max(total, 1)),
    'aria-valuetext': `${used} of ${total} used` + (cooling ? `, ${cooling} cooling` : ''), 'data-level': level || 'ok',
  });
  const u = h('span', {class: 'bar-used'}), c = h('span', {class: 'bar-cooling'});
  const least = used > 0 ? 'max(2px, ' + part(used) + '%)' : '0';
  u.style.width = least;
  c.style.width = part(cooling) + '%';
  e.append(u, c);
  return e;
}

// swatch is a patch in the colour of an overlay.
export function swatch(index) {
  return h('span', {class: 'swatch', 'data-colour': index % 8, 'aria-hidden': 'true'});
}

// badge says a state by shape, colour and word.
export function badge(level, text) {
  return h('span', {class: 'badge', 'data-level': level}, h('span', {class: 'shape', 'aria-hidden': 'true'}, {ok: '●', warning: '▲', full: '■', bad: '■', off: '○'}[level] || '●'), text);
}
