// Numbers, times and words as people read them.

const numbers = new Intl.NumberFormat('en-US');

export const number = n => numbers.format(n);

// capped is a number of which the coordinator says at most 2^62.
export function capped(n) {
  if (n < 1e15) return number(n);
  return '> 10^' + Math.floor(Math.log10(n));
}

export function percent(part, whole) {
  if (!whole) return '0 %';
  const p = 100 * part / whole;
  return (p > 0 && p < 1 ? '< 1' : p > 99 && p < 100 ? '> 99' : Math.round(p)) + ' %';
}

// ago is how long ago a time was, in its two largest units.
export function ago(time, now = Date.now()) {
  const s = Math.max(0, Math.round((now - Date.parse(time)) / 1000));
  if (Number.isNaN(s)) return 'never';
  if (s < 60) return s + ' s';
  if (s < 3600) return Math.floor(s / 60) + ' min';
  if (s < 48 * 3600) return Math.floor(s / 3600) + ' h ' + Math.floor(s % 3600 / 60) + ' min';
  return Math.floor(s / 86400) + ' days';
}

const clocks = new Intl.DateTimeFormat('sv-SE', {dateStyle: 'short', timeStyle: 'medium'});

export function clock(time) {
  const t = new Date(time);
  return Number.isNaN(t.getTime()) ? '' : clocks.format(t);
}

export function plural(n, one, many) {
  return number(n) + ' ' + (n === 1 ? one : many || one + 's');
}

// halfName says which half is meant, for people.
export const halfName = half => ({mesos: 'Mesos', docker: 'Docker', shared: 'shared'}[half] || half || '');

// poolName names what a half gives out addresses of.
export const poolName = half => half === 'shared' ? 'shared pool' : `${halfName(half)} half`;
