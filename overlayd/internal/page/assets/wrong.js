// What is wrong in the cluster, said as `overlayctl doctor` says it: what, what was
// seen, and what to do.
import {h, badge} from './dom.js';
import {ago, number, percent, plural, poolName} from './format.js';

const shown = 25; // of one kind

// health of an agent, worst first: {level, word, findings}.
export function health(a) {
  const found = [];
  const who = `${a.agent_id} at ${a.agent_ip}`;
  if (a.superseded) {
    return {level: 'off', word: 'superseded', findings: [{
      check: 'superseded', severity: 'warning', agent: a.agent_id, what: `${who}: another agent has this address, and the lease of this one is kept`,
      evidence: `${a.superseded} registered with ${a.agent_ip}`, fix: 'overlayctl agents prune',
    }]};
  }
  if (!a.connected) {
    found.push({
      check: 'agent', severity: 'error', agent: a.agent_id, what: `${who} is not connected: it hears of no new peers, and cannot renew its lease`,
      evidence: a.last_seen ? `last seen ${ago(a.last_seen)} ago` : 'not seen since the coordinator started', fix: 'overlayctl status; systemctl status overlayd-agent   (on that host)',
    });
  }
  for (const g of a.overlays || []) {
    if (g.error) found.push({check: 'lease', severity: 'error', agent: a.agent_id, what: `${who} has no subnet of the overlay ${g.overlay.name}`, evidence: g.error, fix: 'overlayctl overlays'});
  }
  let setting = false;
  for (const [name, s] of Object.entries(a.status || {})) {
    if (s.status === 'STATUS_FAILED') {
      found.push({check: 'overlay', severity: 'error', agent: a.agent_id, what: `${who}: the overlay ${name} is not set up`, evidence: s.error || 'no reason given', fix: 'overlayctl doctor --fix   (on that host)'});
    } else if (s.status !== 'STATUS_OK') setting = true;
  }
  for (const p of a.problems || []) {
    const [, severity, what] = /^doctor: (error|warning): (.*)$/s.exec(p) || [];
    if (what) {
      found.push({check: 'doctor', severity, agent: a.agent_id, what: `${who}: ${what}`, evidence: 'doctor on that host says so', fix: 'overlayctl doctor   (on that host)'});
      continue;
    }
    found.push({check: 'host', severity: 'warning', agent: a.agent_id, what: `${who}: ${p}`, evidence: 'the agent says so', fix: 'overlayctl doctor   (on that host)'});
  }
  if (!a.connected) return {level: 'bad', word: 'gone', findings: found};
  if (found.some(f => f.severity === 'error')) return {level: 'bad', word: 'failed', findings: found};
  if (found.length) return {level: 'warning', word: 'problems', findings: found};
  if (setting || !Object.keys(a.status || {}).length) return {level: 'warning', word: 'setting up', findings: found};
  return {level: 'ok', word: 'ok', findings: found};
}

// wrong lists everything, errors first.
export function wrong(model) {
  const list = [];
  for (const url of model.usage.incomplete) {
    list.push({
      check: 'coordinator', severity: 'warning', what: `containers and addresses are incomplete: the coordinator ${url} cannot be reached`,
      evidence: 'what its agents report is missing here, or old', fix: 'systemctl status overlayd-coordinator   (on that host)',
    });
  }
  if (model.usage.unreported) {
    list.push({
      check: 'reports', severity: 'warning', what: `containers and addresses are incomplete: ${plural(model.usage.unreported, 'connected agent')} to report yet`,
      evidence: 'for some seconds after a coordinator was started this is as it should be', fix: 'overlayctl agents',
    });
  }
  for (const o of model.overlays) {
    for (const [pool, range] of [[o.pool, o.subnet], [o.pool6, o.subnet6]]) {
      if (!pool || !pool.total || pool.used < 0.8 * pool.total) continue;
      const full = pool.used >= pool.total;
      list.push({
        check: 'subnets', severity: full ? 'error' : 'warning', what: full ? `the overlay ${o.name} has no subnet left for another host` : `the overlay ${o.name} has few subnets left for further hosts`,
        evidence: `${number(pool.used)} of ${number(pool.total)} agent subnets of ${range} are leased (${percent(pool.used, pool.total)})`, fix: 'overlayctl agents prune',
      });
    }
  }
  for (const a of model.agents) list.push(...health(a).findings);
  for (const u of model.usage.agents) {
    if (u.level !== 'warning' && u.level !== 'full') continue;
    const full = u.level === 'full';
    list.push({
      check: 'addresses', severity: full ? 'error' : 'warning', agent: u.agent_id,
      what: `the ${poolName(u.half)} of ${u.overlay} on ${u.agent_id} at ${u.agent_ip} is ${full ? 'full: containers are refused' : 'nearly full'}`,
      evidence: `${number(u.used)} used, ${number(u.cooling)} cooling, ${number(u.free)} free of ${number(u.total)}`,
      fix: 'overlayctl ipam check   (on that host)',
    });
  }
  return list.sort((a, b) => (a.severity === 'error' ? 0 : 1) - (b.severity === 'error' ? 0 : 1));
}

// findings shows a list, a few of each kind.
export function findings(list, onagent) {
  if (!list.length) return h('p', {class: 'fine'}, badge('ok', 'Nothing is wrong that the coordinator knows of.'), ' ', h('span', {class: 'muted'}, 'On a host, ', h('code', {}, 'overlayctl doctor'), ' looks at more.'));
  const kinds = new Map();
  for (const f of list) {
    const key = f.severity + ' ' + f.check;
    if (!kinds.has(key)) kinds.set(key, []);
    kinds.get(key).push(f);
  }
  const out = [];
  for (const of of kinds.values()) {
    for (const f of of.slice(0, shown)) out.push(finding(f, onagent));
    if (of.length > shown) out.push(h('li', {class: 'more muted'}, `and ${plural(of.length - shown, 'more finding')} of the kind "${of[0].check}"`));
  }
  return h('ul', {class: 'findings'}, out);
}

function finding(f, onagent) {
  return h('li', {'data-severity': f.severity},
    h('p', {class: 'what'}, badge(f.severity === 'error' ? 'bad' : 'warning', f.severity), ' ', f.what),
    h('p', {class: 'muted'}, 'Seen: ', f.evidence),
    h('p', {class: 'fix'}, 'Do: ', h('code', {}, f.fix), f.agent && onagent ? [' ', h('button', {type: 'button', class: 'link', onclick: () => onagent(f.agent)}, 'look at the agent')] : null));
}
