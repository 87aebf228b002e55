// Address space: prefixes of both families as numbers, and what lies in one.

const known = new Map(); // the same prefixes come again and again

// parse reads a prefix such as 9.0.0.0/8; null when it is none.
export function parse(text) {
  if (known.has(text)) return known.get(text);
  if (known.size > 500000) known.clear();
  const p = read(text);
  known.set(text, p);
  return p;
}

function read(text) {
  const [ip, len] = String(text || '').split('/');
  const value = ip.includes(':') ? parse6(ip) : parse4(ip);
  const bits = ip.includes(':') ? 128 : 32, n = len === undefined ? bits : Number(len);
  if (value === null || !Number.isInteger(n) || n < 0 || n > bits) return null;
  const host = BigInt(bits - n);
  return {addr: value >> host << host, len: n, bits};
}

function parse4(ip) {
  const parts = ip.split('.');
  if (parts.length !== 4 || parts.some(p => !/^\d{1,3}$/.test(p) || p > 255)) return null;
  return parts.reduce((n, p) => n << 8n | BigInt(p), 0n);
}

function parse6(ip) {
  const [head, tail, more] = ip.split('::').map(s => s === '' ? [] : s.split(':'));
  if (more) return null;
  const groups = tail === undefined ? head : [...head, ...Array(Math.max(0, 8 - head.length - tail.length)).fill('0'), ...tail];
  if (groups.length !== 8 || groups.some(g => !/^[0-9a-fA-F]{1,4}$/.test(g))) return null;
  return groups.reduce((n, g) => n << 16n | BigInt('0x' + g), 0n);
}

// address writes a number as an address.
export function address(addr, bits) {
  if (bits === 32) return [24n, 16n, 8n, 0n].map(s => addr >> s & 255n).join('.');
  const groups = [];
  for (let s = 112n; s >= 0n; s -= 16n) groups.push((addr >> s & 0xffffn).toString(16));
  let best = -1, most = 1;
  for (let i = 0; i < 8; i++) {
    let n = 0;
    while (i + n < 8 && groups[i + n] === '0') n++;
    if (n > most) { best = i; most = n; }
  }
  if (best < 0) return groups.join(':');
  return groups.slice(0, best).join(':') + '::' + groups.slice(best + most).join(':');
}

export const write = p => address(p.addr, p.bits) + '/' + p.len;

export const same = (a, b) => a.bits === b.bits && a.len === b.len && a.addr === b.addr;

// holds reports whether b lies in a.
export function holds(a, b) {
  return a.bits === b.bits && a.len <= b.len && (a.addr ^ b.addr) >> BigInt(a.bits - a.len) === 0n;
}

// child is one of the 2^step parts of a prefix.
export function child(p, step, i) {
  const len = p.len + step;
  return {addr: p.addr | BigInt(i) << BigInt(p.bits - len), len, bits: p.bits};
}

// place is which of the 2^step parts of p holds q.
export function place(p, step, q) {
  return Number((q.addr - p.addr) >> BigInt(p.bits - p.len - step));
}

// common is the smallest prefix that holds all.
export function common(list) {
  return list.reduce((a, b) => {
    let len = Math.min(a.len, b.len);
    while (len > 0 && (a.addr ^ b.addr) >> BigInt(a.bits - len) !== 0n) len--;
    const host = BigInt(a.bits - len);
    return {addr: a.addr >> host << host, len, bits: a.bits};
  });
}

// spaces are what there is a map of: the range of each overlay and family, and
// those of one family together.
export function spaces(overlays) {
  const list = [];
  for (const bits of [32, 128]) {
    const ranges = [];
    overlays.forEach((o, colour) => {
      const root = parse(bits === 32 ? o.subnet : o.subnet6);
      if (root) ranges.push({key: o.name + (bits === 32 ? '' : ' IPv6'), overlay: o.name, title: `${o.name}, ${write(root)}`, root, colour, leaf: (bits === 32 ? o.prefix : o.prefix6) || root.len});
    });
    for (const r of ranges) r.ranges = [r];
    list.push(...ranges);
    if (ranges.length > 1) {
      const root = common(ranges.map(r => r.root));
      const name = bits === 32 ? 'IPv4' : 'IPv6';
      list.push({key: 'all ' + name, overlay: '', title: `all of ${name}, ${write(root)}`, root, leaf: Math.max(...ranges.map(r => r.leaf)), ranges, colour: 0});
    }
  }
  return list;
}

// layouts are the blocks of spaces without how full they are, which changes all the
// time while the blocks seldom do.
let layouts = {of: null, by: new Map()};

function layout(model, space) {
  if (layouts.of !== model.agents) layouts = {of: model.agents, by: new Map()};
  const key = space.key + ' ' + write(space.root);
  if (layouts.by.has(key)) return layouts.by.get(key);
  const colours = new Map(space.ranges.map(r => [r.overlay, r.colour])), found = new Map();
  for (const a of model.agents) {
    for (const g of a.overlays || []) {
      const name = g.overlay.name;
      if (!colours.has(name)) continue;
      const list = [g, ...(g.blocks || [])].map(b => space.root.bits === 32 ? b.subnet : b.subnet6).filter(Boolean);
      for (const text of list) {
        const prefix = parse(text);
        if (!prefix || !holds(space.root, prefix)) continue;
        found.set(text, {prefix, overlay: name, colour: colours.get(name), agent: a.agent_id, ip: a.agent_ip, key: a.agent_id + '/' + name, of: list.length});
      }
    }
  }
  const list = [...found.values()].sort((x, y) => x.prefix.addr < y.prefix.addr ? -1 : x.prefix.addr > y.prefix.addr ? 1 : x.prefix.len - y.prefix.len);
  layouts.by.set(key, list);
  return list;
}

// blocks are the agent subnets of a space, in the order of addresses, with how full
// they are. Several blocks of an agent are one pool, of which each has its share.
export function blocks(model, space) {
  const use = new Map();
  for (const u of model.usage.agents) {
    const key = u.agent_id + '/' + u.overlay, list = use.get(key);
    if (list) list.push(u);
    else use.set(key, [u]);
  }
  return layout(model, space).map(l => {
    const b = {...l, halves: use.get(l.key) || [], used: 0, cooling: 0, total: 0, level: 'ok'};
    for (const u of b.halves) {
      b.used += Math.round(u.used / b.of);
      b.cooling += Math.round(u.cooling / b.of);
      b.total += Math.round(u.total / b.of);
      if (u.level === 'full' || u.level === 'warning' && b.level === 'ok') b.level = u.level;
    }
    return b;
  });
}

const most = 8; // bits of a step: 16 by 16 cells

// step is into how many parts a prefix of a space is drawn, as a power of two; 0
// at a block.
export function step(space, p, list) {
  if (list.some(b => holds(b.prefix, p))) return 0;
  return Math.max(1, Math.min(most, space.leaf - p.len));
}

// trail are the prefixes from the whole of a space to p, as one zooms in.
export function trail(space, p, list) {
  const out = [space.root];
  for (let at = space.root; !same(at, p);) {
    const n = step(space, at, list);
    if (n === 0) { // a block, and p is a half of it
      out.push(p);
      break;
    }
    const len = Math.min(at.len + n, p.len), host = BigInt(p.bits - len);
    at = {addr: p.addr >> host << host, len, bits: p.bits};
    out.push(at);
  }
  return out;
}
