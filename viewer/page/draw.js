// Weights as pictures: maps, and lines from token to token.

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const rgb = (hex) => [1, 3, 5].map((n) => parseInt(hex.slice(n, n + 2), 16));
const pixel = ([r, g, b]) => (255 << 24) | (b << 16) | (g << 8) | r;
const inkOn = ([r, g, b]) => (0.3 * r + 0.6 * g + 0.1 * b > 110 ? "#111" : "#fff");

// 256 colours for weights from 0 to 1 in all heads; square roots let weak ones show
let colours, pixels, masked;
const level = (weight) => Math.round(255 * Math.sqrt(Math.min(1, weight)));
function readColours() {
  const stops = colour("ramp").split(" ").map(rgb);
  colours = range(256).map((n) => {
    const at = (n / 256) * (stops.length - 1), from = Math.floor(at);
    return stops[from].map((value, c) => Math.round(value + (at - from) * (stops[from + 1][c] - value)));
  });
  pixels = colours.map(pixel);
  masked = pixel(rgb(colour("masked")));
}

function paint(width, height, cells) {
  const canvas = el("canvas", { width, height }), context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  new Int32Array(image.data.buffer).set(cells);
  context.putImageData(image, 0, 0);
  return canvas;
}

// A cell shows a weight or, if two texts are compared, by how much it differs; null if there is nothing to show
function visitCells(panel, visit) {
  const { queries, keys } = panel.axis, value = compares() ? difference : weight;
  for (let i = 0; i < queries.length; i++)
    for (let j = 0; j < keys.length; j++) visit(isMasked(panel, i, j) ? null : value(panel, i, j), i, j);
}

function tone(value) {
  if (!compares()) return colours[level(value)];
  const paper = rgb(colour("paper")), ink = rgb(colour(value > 0 ? "seen" : "accent")), much = Math.sqrt(Math.abs(value));
  return paper.map((from, c) => Math.round(from + much * (ink[c] - from)));
}

function bitmap(panel) {
  const cells = [];
  visitCells(panel, (value) => cells.push(value === null ? masked : compares() ? pixel(tone(value)) : pixels[level(value)]));
  return paint(panel.axis.keys.length, panel.axis.queries.length, cells);
}

const focused = () => state.hover ?? { i: state.row, j: state.column };
const LEFT = 84, TOP = 76; // pixels for the names beside a map

const short = (name, most) => (name.length > most ? `${name.slice(0, most - 1)}…` : name);

function cellSize({ axis: { queries, keys } }, width, height) {
  return Math.min(88, (width - LEFT - 2) / keys.length, (height - TOP - 2) / queries.length);
}

function drawMap(canvas) {
  const { cell } = canvas, { panel } = state, { queries, keys } = panel.axis, context = canvas.getContext("2d");
  const [wide, high] = [cell * keys.length, cell * queries.length], dense = window.devicePixelRatio;
  Object.assign(canvas, { width: (LEFT + wide + 2) * dense, height: (TOP + high + 2) * dense });
  canvas.style.width = `${LEFT + wide + 2}px`; // the height follows
  context.scale(dense, dense);
  context.imageSmoothingEnabled = false;
  context.drawImage(panel.small, LEFT, TOP, wide, high);
  drawNames(context, cell, queries, keys);
  if (cell >= 34) drawWeights(context, panel, cell);
  const outline = ({ i, j }, name, thick) => {
    Object.assign(context, { strokeStyle: colour(name), lineWidth: thick });
    context.strokeRect(LEFT + j * cell, TOP + i * cell, cell, cell);
  };
  if (state.hover) outline(state.hover, "soft", 1.5);
  outline({ i: state.row, j: state.column }, "seen", 2.5);
}

// Names on both sides of a map; if they do not fit, those in focus
function drawNames(context, cell, queries, keys) {
  const { i, j } = focused(), fits = cell >= 9, size = fits ? Math.min(12, cell) : 12;
  const write = (name, isFocus, dx, dy, angle) => {
    if (!fits && !isFocus) return;
    context.save();
    context.translate(dx, dy);
    context.rotate(angle);
    context.font = `${isFocus ? "bold " : ""}${size}px ui-monospace, monospace`;
    Object.assign(context, { fillStyle: colour(isFocus ? "accent" : "soft"), textAlign: angle ? "left" : "right" });
    context.fillText(short(name, 10), 0, 0);
    context.restore();
  };
  context.textBaseline = "middle";
  queries.forEach((name, n) => write(name, n === i, LEFT - 6, TOP + (n + 0.5) * cell, 0));
  keys.forEach((name, n) => write(name, n === j, LEFT + (n + 0.5) * cell, TOP - 6, -Math.PI / 2));
  Object.assign(context, { font: "11px system-ui", fillStyle: colour("soft") });
  context.fillText("keys →", 0, 8);
  context.fillText("queries ↓", 0, 24);
}

function drawWeights(context, panel, cell) {
  Object.assign(context, { textAlign: "center", font: `${Math.min(15, cell / 3.2)}px system-ui` });
  visitCells(panel, (value, i, j) => {
    const text = value === null ? "" : show(value, cell > 60 ? 4 : 2);
    context.fillStyle = inkOn(tone(value ?? 0));
    context.fillText(text, LEFT + (j + 0.5) * cell, TOP + (i + 0.5) * cell);
  });
}

const FAINT = 0.02; // lines below it could not be seen

// Queries on the left, keys on the right
function drawLines(width, height) {
  const { panel, hover: at } = state, { queries, keys, self } = panel.axis, most = Math.max(queries.length, keys.length);
  const step = Math.max(17, Math.min(40, height / most)), from = 130, to = width - 130, half = width / 2;
  const y = (n) => (n + 0.5) * step, both = (n) => ({ i: n, j: n }), lines = [];
  for (const i of range(queries.length))
    for (const j of range(keys.length)) {
      const w = weight(panel, i, j), asks = !at || i === at.i;
      if (w < FAINT || !(asks || j === at.j)) continue;
      const d = `M${from} ${y(i)}C${half} ${y(i)} ${half} ${y(j)} ${to} ${y(j)}`;
      lines.push(svg("path", { d, "stroke-opacity": Math.sqrt(w), class: asks ? "accent" : "seen" }));
    }
  const names = (list, x, anchor, point) => list.map((name, n) => {
    const text = svg("text", { x, y: y(n) + 4, "text-anchor": anchor }, short(name, 15));
    text.onpointerenter = () => hover(point(n));
    text.onclick = () => choose(Math.min(n, queries.length - 1));
    return text;
  });
  return picture("lines", width, step * most,
    ...lines, ...names(queries, from - 8, "end", self ? both : (i) => ({ i, j: -1 })),
    ...names(keys, to + 8, "start", self ? both : (j) => ({ i: -1, j })));
}

// Curves [[kind, [[step, y], ...]], ...]; lines mark the step `now` and a `level`
function chart(curves, { level = null, now, top = null }) {
  const points = curves.flatMap(([, all]) => all), [W, H, left] = [390, 132, 34];
  const last = Math.max(1, ...points.map(([x]) => x)), most = top ?? Math.max(1e-9, ...points.map(([, y]) => y));
  const x = (value) => left + ((W - left - 6) * value) / last, y = (value) => 6 + (H - 24) * (1 - value / most);
  const path = (kind, all) => svg("path", { class: kind, d: all.map(([px, py], n) => `${n ? "L" : "M"}${x(px)} ${y(py)}`).join("") });
  const text = (x, y, words) => svg("text", { x, y, "text-anchor": "end" }, words);
  return picture("curves", W, H,
    text(left - 4, 14, show(most, 2)), text(W - 6, H - 4, `step ${last}`),
    ...curves.map(([kind, all]) => path(kind, all)),
    path("dashed", level === null ? [] : [[0, level], [last, level]]), path("now", [[now, 0], [now, most]]));
}
