"use strict";
// The scenes that the page was given, and what is in view.

const $ = (id) => document.getElementById(id);
const scenes = JSON.parse($("data").textContent);
const state = {
  scene: null, frame: null, panel: null, // a frame is a checkpoint, a panel is a head
  row: 0, column: 0, // the query and key in view
  hover: null, // {i, j} under the pointer
  view: "map", side: "numbers",
  temperature: 1, topK: 0, topP: 1, minP: 0, seed: 1, writing: null, // an object of its own for each time of writing
  score: "previous", token: null, // in view of training and of Follow
};

function prepare(scene) {
  if (scene.model) return wake(scene);
  for (const panel of scene.frames.flatMap((frame) => frame.panels)) panel.axis = scene.axes[panel.axes];
  for (const axis of scene.axes) axis.self = axis.queries.join("\0") === axis.keys.join("\0");
}

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const floats = (base64) => new Float32Array(bytesOf(base64).buffer);

// A tensor of a panel (w, q, k, v, o) or a frame, decoded when needed
function tensor(holder, name) {
  holder.decoded ??= {};
  return (holder.decoded[name] ??= floats(holder[name]));
}

// Row n of a tensor that has `rows` rows. Neighbouring heads may share one head of keys and values
function row(holder, name, n, rows) {
  if (holder.frame) {
    const { record, gpt: { config } } = holder.frame, { head_dim: D, n_head: H, n_kv_head: K } = config;
    const heads = name === "k" || name === "v" ? K : H, start = (n * heads + Math.floor((holder.head * heads) / H)) * D;
    return [...record.layers[holder.row][name === "o" ? "y" : name].subarray(start, start + D)];
  }
  const all = tensor(holder, name), width = all.length / rows;
  return Array.from(all.subarray(n * width, (n + 1) * width));
}

const isMasked = ({ axis }, i, j) => axis.causal && j > i;

function weight(panel, i, j) {
  if (isMasked(panel, i, j)) return 0;
  const { frame, row: layer, head, axis } = panel;
  return frame ? frame.record.layers[layer].weights[head][(i * (i + 1)) / 2 + j] : tensor(panel, "w")[i * axis.keys.length + j];
}

// A new element; its texts become text nodes, never HTML
function el(tag, { style, data, ...properties }, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  Object.assign(node.style, style);
  Object.assign(node.dataset, data);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS($("svg").namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const picture = (name, width, height, ...children) =>
  svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name }, ...children);

// Its key lets it keep the focus when the page is drawn again
const button = (key, name, onclick, more) => el("button", { data: { key }, tabIndex: 0, onclick, ...more }, name);
// A list to choose state[key] from
function select(key, chosen, options) {
  const pick = el("select", { ariaLabel: key, data: { key }, tabIndex: 0, onchange: () => update({ [key]: pick.value }) },
    ...options.map(([value, name]) => el("option", { value, selected: value === chosen }, name)));
  return pick;
}

const p = (...children) => el("p", {}, ...children);
const b = (text, name = "") => el("b", { data: { name } }, text);
const note = (...children) => el("p", { className: "soft" }, ...children);
const heading = (text) => el("h3", {}, text);
const swatch = (name, text) => el("span", {},
  el("span", { className: "swatch", style: { background: `var(--${name})` } }), text);

const range = (n) => [...Array(n).keys()];
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const dot = (a, b) => a.reduce((total, value, n) => total + value * b[n], 0);
const mean = (numbers) => sum(numbers) / numbers.length; // NaN of none
const quoted = (token) => `“${token}”`;

// 0.25 -> "0.2500", 1e-6 -> "1.00e−6"; with `digits` = 2, 0.25 -> "0.25"
function show(number, digits) {
  if (number === null || Number.isNaN(number)) return "–";
  const size = Math.abs(number), far = !digits && size && (size >= 1e5 || size < 5e-5);
  const text = far ? number.toExponential(2) : number.toFixed(digits ?? 4);
  return (Number(text) ? text : text.replace("-", "")).replaceAll("-", "−");
}

const signed = (number, digits = 3) => (number > 0 ? "+" : "") + show(number, digits);

// Rows of texts or elements; rows `chosen` and `total` are marked
function table(head, rows, chosen = -1, total = -1) {
  const line = (tag) => (cells, n) => el("tr", { className: n === chosen ? "chosen" : n === total ? "sum" : "" },
    ...cells.map((cell) => el(tag, {}, cell)));
  return el("table", {}, el("thead", {}, line("th")(head)), el("tbody", {}, ...rows.map(line("td"))));
}
