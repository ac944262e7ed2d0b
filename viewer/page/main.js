// Build the page, and let pointer and keys move through it.

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const badge = (label) => label[0].toUpperCase() + label[1];
const MOST_CHARACTERS = 50_000; // typed; a page that encodes more would not answer for long
const inside = (n, length) => Math.max(0, Math.min(length - 1, n));

// Tab goes to the chosen one of a group; arrow keys call `go(down, right)`
function member(key, isChosen, go, properties) {
  const onkeydown = (event) => {
    if (!ARROWS[event.key]) return;
    event.preventDefault();
    go(...ARROWS[event.key]);
  };
  return { onkeydown, tabIndex: isChosen ? 0 : -1, ...properties, data: { key, ...properties.data } };
}

function update(changes) {
  Object.assign(state, { hover: null }, changes);
  redraw(render);
}

// What is drawn anew keeps the focus
function redraw(draw) {
  const { key } = document.activeElement.dataset;
  draw();
  if (key) document.querySelector(`[data-key=${key}][tabindex="0"]`)?.focus();
}

// Choose a query, and the key that it attends to most
function choose(i) {
  if (state.scene.model) recordOf(state.scene, state.frame, state.scene.ids);
  const keys = range(state.panel.axis.keys.length), w = (j) => weight(state.panel, i, j);
  update({ row: i, column: keys.reduce((best, j) => (w(j) > w(best) ? j : best), 0) });
}

function choosePanel(panel) {
  const { queries, keys } = panel.axis;
  update({ panel, row: inside(state.row, queries.length), column: inside(state.column, keys.length) });
}

// Another checkpoint, with the same head in view
const turnTo = (frame) => update({ frame, panel: frame.panels[state.frame.panels.indexOf(state.panel)] });

function openScene(scene) {
  const frame = scene.frames.at(-1), max = scene.frames.length - 1;
  Object.assign(state, { scene, frame, panel: frame.panels[0], writing: null });
  const film = el("input", { type: "range", min: 0, max, value: max, ariaLabel: "checkpoint",
    oninput: () => turnTo(scene.frames[film.value]) });
  $("film").replaceChildren(...(max ? [el("label", {}, el("span", { id: "step" }), film)] : []));
  for (const box of [$("typed"), $("start")]) box.hidden = !scene.model;
  $("walk").hidden = true;
  if (!scene.ids) return choose(state.panel.axis.queries.length - 1);
  if (scene.model) recordOf(scene, frame, scene.ids);
  update(worthSeeing(scene));
}

function hover(at) {
  if (at?.i === state.hover?.i && at?.j === state.hover?.j) return;
  state.hover = at;
  shade();
  draw();
}

function render() {
  const { scene, frame } = state;
  if (scene.model) recordOf(scene, frame, scene.ids);
  if (compares()) recordOf(scene, frame, scene.other, "second");
  $("run").textContent = scene.run ?? "";
  tabs($("tabs"), scenes.map((s) => s.name), scenes.indexOf(scene), (n) => openScene(scenes[n]));
  renderText();
  renderGrid();
  renderLegend();
  renderBar();
  renderMaps();
  renderSide();
}

function tabs(box, names, chosen, pick) {
  const go = (_, step) => pick((chosen + step + names.length) % names.length);
  box.replaceChildren(...names.map((name, n) => el("button", member(box.id, n === chosen, go,
    { role: "tab", ariaSelected: n === chosen, onclick: () => pick(n) }), name)));
}

function renderText() {
  const { axis } = state.panel, { ids } = state.scene, { length } = axis.queries;
  const strip = (kind, names, point) => el("div", { className: "strip", role: "group", ariaLabel: kind },
    axis.self ? null : el("small", {}, `${kind} `),
    ...names.flatMap((name, n) => {
      const pick = (to) => (kind === "keys" ? update({ column: inside(to, names.length) }) : choose(inside(to, length)));
      const [on, off] = [() => hover(point(n)), () => hover(null)];
      const properties = { className: "token", role: "button", data: { kind, n }, title: `position ${n}` + (ids ? `, token ${ids[n]}` : ""),
        onclick: () => pick(n), onpointerenter: on, onfocus: on, onpointerleave: off, onblur: off };
      const chosen = kind === "keys" ? state.column : state.row;
      const token = el("span", member(kind, n === chosen, (down, right) => pick(chosen + down + right), properties), name);
      return name.includes("↵") ? [token, el("br", {})] : token;
    }));
  const strips = axis.self ? [strip("tokens", axis.queries, (n) => ({ i: n, j: n }))]
    : [strip("queries", axis.queries, (i) => ({ i, j: -1 })), strip("keys", axis.keys, (j) => ({ i: -1, j }))];
  $("text").replaceChildren(...strips);
  shade();
}

// Fill what the query in focus attends to; underline what attends to the key in focus
function shade() {
  const { i, j } = focused(), { panel } = state, { queries, keys } = panel.axis;
  for (const token of document.querySelectorAll("#text .token")) {
    const { kind } = token.dataset, n = Number(token.dataset.n);
    const looks = i < 0 || kind === "queries" ? 0 : weight(panel, i, n);
    const seen = j < 0 || kind === "keys" ? 0 : weight(panel, n, j);
    const fill = looks > 0.002 ? colours[level(looks)] : null;
    token.style.background = fill ? `rgb(${fill})` : "";
    token.style.color = fill ? inkOn(fill) : "";
    token.style.borderColor = `color-mix(in srgb, var(--seen) ${Math.round(100 * Math.sqrt(seen))}%, transparent)`;
    token.classList.toggle("asks", kind !== "keys" && n === i);
  }
  const [asks, key] = [`${quoted(queries[i])} (${i})`, `${quoted(keys[j])} (${j})`];
  const change = compares() && i >= 0 && j >= 0 ? difference(panel, i, j) : null;
  $("readout").textContent = i < 0 || j < 0 ? "" : isMasked(panel, i, j) ? `${asks} cannot attend to ${key}, which comes later`
    : `${asks} attends to ${key} with weight ${show(weight(panel, i, j))}`
      + (change === null ? "" : `, in the other text ${show(weight(panel, i, j) + change)}`);
}

const dark = matchMedia("(prefers-color-scheme: dark)");

function renderGrid() {
  const { scene, frame, panel } = state, paints = [dark.matches, scene.version, compares()].join();
  const inRow = (n) => frame.panels.filter((other) => other.row === n);
  const go = (down, right) => {
    const at = inRow(panel.row).indexOf(panel), there = inRow(panel.row + down);
    choosePanel(there[inside(at + right, there.length)] ?? panel);
  };
  const cell = (other) => {
    if (other.paints !== paints) Object.assign(other, { paints, small: bitmap(other) });
    other.small.style.imageRendering = other.small.width < 48 ? "pixelated" : "auto";
    const properties = { className: scene.off?.has(other.key) ? "cell off" : "cell", ariaPressed: other === panel,
      ariaLabel: other.name, title: other.why ?? "",
      onclick: () => choosePanel(other) };
    return el("button", member("grid", other === panel, go, properties), other.small,
      other.label ? el("i", {}, badge(other.label)) : null);
  };
  $("grid").replaceChildren(...scene.rows.flatMap((name, n) => [el("small", {}, name), el("div", { className: "heads",
    style: { gridTemplateColumns: `repeat(${Math.max(3, inRow(n).length)}, 1fr)` } }, ...inRow(n).map(cell))]));
}

function renderLegend() {
  const { scene, frame } = state, labels = [...new Set(frame.panels.map((other) => other.label))].filter(Boolean);
  const tick = (w) => el("small", { style: { left: `${2 + 96 * Math.sqrt(w)}%` } }, `${w}`), { all = [], ids = [] } = scene;
  $("legend").replaceChildren(
    ...(compares() ? [note(swatch("seen", "more there"), swatch("accent", "less"), swatch("masked", "masked or only here"))]
      : [el("div", { className: "scale" }, paint(256, 1, pixels), ...[0, 0.05, 0.25, 0.5, 1].map(tick)), note("weight", swatch("masked", "masked"))]),
    note(labels.map((key) => `${badge(key)} ${scene.scores[key][0]}`).join(" · ")),
    note([scene.about, ...scene.notices].join(" ")),
    note(all.length > ids.length ? `The last ${ids.length} of ${all.length} tokens are shown.` : ""));
}

function renderBar() {
  const { scene, frame, panel, view } = state, isOff = scene.off?.has(panel.key);
  if ($("step")) $("step").textContent = `step ${frame.step}`;
  $("bar").replaceChildren(el("h2", {}, panel.name),
    ...(panel.label ? [el("span", { className: "tag" }, scene.scores[panel.label][0])] : []),
    el("span", { className: "switch" }, ...["map", "lines"].map((name) => button(name, name, () => update({ view: name }), { ariaPressed: name === view }))),
    ...(scene.model ? [el("span", { className: "switch" }, button("off", isOff ? "off" : "switch off", () => switchOff(panel), { ariaPressed: isOff }))] : []));
}

function renderMaps() {
  const box = $("maps"), { panel } = state;
  box.replaceChildren(state.view === "map" ? map(cellSize(panel, box.clientWidth, box.clientHeight))
    : el("div", { className: "lines", onpointerleave: () => hover(null) }));
  draw();
}

function map(cell) {
  const { panel, row, column } = state, { queries, keys } = panel.axis;
  const at = ({ offsetX, offsetY }) => {
    const [j, i] = [Math.floor((offsetX - LEFT) / cell), Math.floor((offsetY - TOP) / cell)];
    return queries[i] === undefined || keys[j] === undefined ? null : { i, j };
  };
  const go = (down, right) => update({ row: inside(row + down, queries.length), column: inside(column + right, keys.length) });
  return el("canvas", member("maps", true, go, { cell, role: "img", ariaLabel: `${panel.name}: arrow keys move the cell`,
    onpointermove: (event) => hover(at(event)), onpointerleave: () => hover(null),
    onclick: (event) => at(event) && update({ row: at(event).i, column: at(event).j }) }));
}

function draw() {
  const box = $("maps").firstChild;
  if (state.view === "map") drawMap(box);
  else box.replaceChildren(drawLines(box.clientWidth, $("maps").clientHeight - 8));
}

function renderSide() {
  const box = $("side"), there = Object.keys(SIDES).filter((key) => SIDES[key][1]()), top = box.scrollTop;
  if (!there.includes(state.side)) state.side = "numbers";
  tabs($("sides"), there.map((key) => SIDES[key][0]), there.indexOf(state.side), (n) => update({ side: there[n] }));
  box.replaceChildren(...SIDES[state.side][2]());
  box.scrollTop = box.dataset.side === state.side ? top : 0;
  box.dataset.side = state.side;
  for (const line of box.querySelectorAll(".scroll .chosen")) line.closest(".scroll").scrollTop = line.offsetTop - 60;
}

// Ids of a text, or null and a notice if the tokenizer knows no such text
function encoded(text) {
  $("notices").textContent = "";
  try {
    if (text.length > MOST_CHARACTERS) throw Error(`a text has at most ${MOST_CHARACTERS} characters here`);
    const { tokenizer, model: { tokenizer: { end } } } = state.scene; // what was written may hold end-of-text
    const pieces = end === null ? [text] : text.split("<|endoftext|>");
    const ids = pieces.flatMap((piece, n) => [...(n ? [end] : []), ...tokenizer.encode(piece)]);
    return ids.length ? ids : null;
  } catch ({ message }) {
    $("notices").textContent = message;
    return null;
  }
}

function switchOff(panel) {
  const { scene } = state;
  if (!scene.off.delete(panel.key)) scene.off.add(panel.key);
  scene.version++;
  update({});
}

$("typed").oninput = () => {
  state.writing = null;
  const ids = encoded($("typed").value);
  if (!ids) return;
  take(state.scene, ids);
  chooseLast();
};
$("start").onclick = () => walk(0);
addEventListener("keydown", ({ key, target, ctrlKey, metaKey, altKey }) => {
  const isFree = !ctrlKey && !metaKey && !altKey && !/TEXTAREA|SELECT/.test(target.tagName) && state.scene.model;
  if (isFree && key.toLowerCase() === "w") write();
  if (isFree && key.toLowerCase() === "n") writeOne();
});

scenes.unshift(examplesScene());
scenes.forEach(prepare);
$("typed").value = scenes[1].text ?? "";
readColours();
openScene(scenes[1]);
addEventListener("resize", renderMaps);
dark.addEventListener("change", () => {
  readColours();
  render();
});
