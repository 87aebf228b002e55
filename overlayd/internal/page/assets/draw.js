// Draws a scene of the map: cells, and in them what they hold.

// scene: {cols, rows, cells: [{kind, colour, fill, level, dots, label, note, parts}], active}
// kind: outside of every overlay, free, part (holds several blocks, as dots), block,
// address (free, used, gateway).

export function theme(element) {
  const css = getComputedStyle(element);
  const v = name => css.getPropertyValue(name).trim();
  return {
    bg: v('--panel'), fg: v('--fg'), line: v('--line'), muted: v('--muted'), warning: v('--warning'), full: v('--bad'), free: v('--free'), focus: v('--focus'),
    colours: Array.from({length: 8}, (_, i) => v('--c' + i)), font: css.fontFamily,
  };
}

export function draw(canvas, scene, t) {
  const scale = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const c = canvas.getContext('2d');
  c.setTransform(scale, 0, 0, scale, 0, 0);
  c.globalAlpha = 1;
  c.fillStyle = t.bg;
  c.fillRect(0, 0, width, height);
  const w = width / scene.cols, h = height / scene.rows;
  scene.cells.forEach((cell, i) => one(c, cell, i % scene.cols * w, Math.floor(i / scene.cols) * h, w, h, t));
  outline(c, scene, w, h, t);
}

function one(c, cell, x, y, w, h, t) {
  const gap = w > 12 ? 1 : 0.5;
  x += gap / 2; y += gap / 2; w -= gap; h -= gap;
  if (cell.kind === 'outside') return;
  c.fillStyle = cell.kind === 'free' ? t.free : t.bg;
  c.fillRect(x, y, w, h);
  if (cell.kind === 'free') tint(c, cell, x, y, w, h, t, 0.07);
  if (cell.kind === 'part') {
    tint(c, cell, x, y, w, h, t, 0.12);
    for (const d of cell.dots) {
      c.globalAlpha = 0.35 + 0.65 * d.fill;
      c.fillStyle = t.colours[d.colour % 8];
      c.fillRect(x + d.x * w, y + d.y * h, Math.max(1, d.w * w - (d.w * w > 3 ? 0.7 : 0)), Math.max(1, d.h * h - (d.h * h > 3 ? 0.7 : 0)));
    }
    c.globalAlpha = 1;
  }
  if (cell.kind === 'block' || cell.kind === 'address') filled(c, cell, x, y, w, h, t);
  if (cell.level === 'warning' || cell.level === 'full') corner(c, cell.level, x, y, w, h, t);
  label(c, cell, x, y, w, h, t);
}

function tint(c, cell, x, y, w, h, t, alpha) {
  if (cell.colour === undefined) return;
  c.globalAlpha = alpha;
  c.fillStyle = t.colours[cell.colour % 8];
  c.fillRect(x, y, w, h);
  c.globalAlpha = 1;
}

// filled draws something leased, pale, and how full it is from below, strong.
function filled(c, cell, x, y, w, h, t) {
  tint(c, cell, x, y, w, h, t, 0.3);
  c.fillStyle = t.colours[cell.colour % 8];
  const used = Math.max(cell.fill > 0 ? 1.5 : 0, cell.fill * h);
  c.fillRect(x, y + h - used, w, used);
  if (cell.cooling) {
    c.globalAlpha = 0.6;
    c.fillRect(x, y + h - used - cell.cooling * h, w, cell.cooling * h);
    c.globalAlpha = 1;
  }
}

// corner marks by shape what is nearly full (a triangle) or full (a square).
function corner(c, level, x, y, w, h, t) {
  const s = Math.max(3, Math.min(14, w / 3));
  c.fillStyle = level === 'full' ? t.full : t.warning;
  if (level === 'full') {
    c.fillRect(x + w - s, y, s, s);
    return;
  }
  c.beginPath();
  c.moveTo(x + w - s, y);
  c.lineTo(x + w, y);
  c.lineTo(x + w, y + s);
  c.fill();
}

// label writes what a cell is, on a ground of its own: the cell may have any colour.
function label(c, cell, x, y, w, h, t) {
  if (!cell.label || w < 30 || h < 16) return;
  const size = Math.max(10, Math.min(15, w / 4.2));
  const lines = [[cell.label, size, t.fg]];
  if (h >= 3.2 * size) for (const text of cell.note || []) lines.push([text, size * 0.85, t.muted]);
  let at = y + 3;
  for (const [text, px, colour] of lines) {
    c.font = `${px}px ${t.font}`;
    const wide = c.measureText(text).width;
    if (wide > w - 6 || at + px + 2 > y + h) continue;
    c.globalAlpha = 0.86;
    c.fillStyle = t.bg;
    c.fillRect(x + 2, at, wide + 4, px + 3);
    c.globalAlpha = 1;
    c.fillStyle = colour;
    c.textBaseline = 'top';
    c.fillText(text, x + 4, at + 2);
    at += px + 4;
  }
}

function outline(c, scene, w, h, t) {
  if (scene.active === undefined || scene.active < 0) return;
  const x = scene.active % scene.cols * w, y = Math.floor(scene.active / scene.cols) * h;
  c.lineWidth = 3;
  c.strokeStyle = t.focus;
  c.strokeRect(x + 1.5, y + 1.5, w - 3, h - 3);
}

// zoom shows the way from one scene, a picture of which is given, to the one that
// is drawn on the canvas now: rect is the cell that it was, as parts of the whole.
export function zoom(canvas, before, rect, inward, done) {
  const c = canvas.getContext('2d'), after = copy(canvas), W = canvas.width, H = canvas.height, began = performance.now(), lasts = 220;
  const frame = now => {
    const t = Math.min(1, Math.max(0, (now - began) / lasts)), e = 1 - (1 - t) * (1 - t);
    const k = inward ? e : 1 - e; // 0: the cell in the whole, 1: the cell is all
    const scale = 1 + (1 / rect.w - 1) * k, scaleY = 1 + (1 / rect.h - 1) * k;
    const outer = inward ? before : after, inner = inward ? after : before;
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.globalAlpha = 1;
    c.drawImage(outer, -rect.x * W * scale * k, -rect.y * H * scaleY * k, W * scale, H * scaleY);
    c.globalAlpha = k;
    c.drawImage(inner, rect.x * W * scale * (1 - k), rect.y * H * scaleY * (1 - k), W * rect.w * scale, H * rect.h * scaleY);
    c.globalAlpha = 1;
    if (t < 1) requestAnimationFrame(frame);
    else done();
  };
  requestAnimationFrame(frame);
}

export function copy(canvas) {
  const to = document.createElement('canvas');
  to.width = canvas.width;
  to.height = canvas.height;
  if (canvas.width && canvas.height) to.getContext('2d').drawImage(canvas, 0, 0);
  return to;
}
