// Predictions, scores, heads switched off, and training.

function meter(value, most, tick = null) {
  const percent = (number) => `${100 * Math.max(0, Math.min(1, number / most))}%`;
  return el("span", { className: "meter" }, el("i", { style: { width: percent(value) } }),
    tick === null ? null : el("b", { style: { left: percent(tick) } }));
}

function slider(name, key, min, max, step, redraw, zero = "0") {
  const output = el("output", {}, state[key] || zero);
  const input = el("input", { type: "range", min, max, step, value: state[key], ariaLabel: name });
  input.oninput = () => {
    output.textContent = (state[key] = Number(input.value)) || zero;
    redraw();
  };
  return el("label", {}, el("span", {}, name), input, output);
}

function scoresSide() {
  const { panel, scene } = state, found = scores(panel);
  const rows = Object.entries(scene.scores).map(([key, [name]]) => {
    const numbers = found[key];
    const most = key === "distance" ? 1.2 * Math.max(1, numbers[0], numbers[1]) : 1;
    return [name, meter(numbers[0], most, numbers[1]), ...numbers.map((x) => show(x, key === "distance" ? 1 : 2))];
  });
  return [
    p(b(panel.label ? scene.scores[panel.label][0] : "no label"), ": ", panel.why, "."),
    table(["score", "", "text", "uniform", "probe", "uniform"], rows),
    ...Object.values(scene.scores).map(([name, meaning]) => note(`${name}: ${meaning}`)),
    note("Orange: uniform. Probe: text of the model, or stories; for induction and duplicates random tokens said twice, "
      + "the lowest score over several periods."),
  ];
}

const tint = (change, most) => ({ background: `color-mix(in srgb, var(--${change > 0 ? "seen" : "accent"}) `
  + `${Math.round(75 * Math.min(1, Math.abs(change) / most))}%, transparent)` });

const isKnown = (holder, name) => !state.scene.model || (holder.memo?.version === state.scene.version && name in holder.memo);

// Compute one by one what a view still lacks, so that the page never stops; then show it
async function fill(missing, compute) {
  const { side, frame, scene: { version } } = state;
  for (const holder of missing) {
    await new Promise((done) => setTimeout(done));
    if (state.side !== side || state.frame !== frame || state.scene.version !== version) return;
    compute(holder);
  }
  if (missing.length) redraw(renderSide);
}

function offSide() {
  const { panel, frame, scene } = state, { queries } = panel.axis, changes = costs(panel), nats = losses(frame);
  const largest = (all) => Math.max(0.05, ...all.map(Math.abs)), isOff = scene.off?.has(panel.key);
  const on = [...nats].map((value, n) => (isOff ? value - changes[n] : value));
  const chips = changes.map((change, n) => el("span", { className: "token", style: tint(change, largest(changes)) }, queries[n + 1]));
  const worst = range(changes.length).sort((m, n) => Math.abs(changes[n]) - Math.abs(changes[m]));
  const means = frame.panels.map((other) => (isKnown(other, "costs") ? mean(costs(other)) : null));
  fill(frame.panels.filter((other) => !isKnown(other, "costs")), costs);
  const heads = scene.rows.map((name, layer) => el("tr", {}, el("td", {}, name), ...frame.panels.flatMap((other, n) =>
    other.row !== layer ? [] : el("td", { style: { ...tint(means[n], largest(means)), fontWeight: other === panel ? 700 : 400 } },
      show(means[n], 2)))));
  return [
    p(`Without ${panel.name} the loss of this text goes from ${show(mean(on))} to `,
      b(show(mean(on) + mean(changes)), "off"),
      ` nats per token (${signed(mean(changes))}).`),
    note(`On the probes ${signed(panel.worth[0])}, on a copy of random tokens ${signed(panel.worth[1])}.`),
    el("div", { className: "strip" }, el("span", { className: "token soft" }, queries[0]), ...chips),
    note(swatch("seen", "harder to predict"), swatch("accent", "easier")),
    heading("Mean change without each head"),
    el("table", { className: "dense" }, ...heads),
    heading("Each token"),
    scroll(table(["token", "with", "without", "change"], worst.map((n) =>
      [`${n + 1} ${queries[n + 1]}`, show(on[n], 3), show(on[n] + changes[n], 3), signed(changes[n])]))),
  ];
}

function trainingSide() {
  const { scene, frame, panel, score } = state, chosen = frame.panels.indexOf(panel), now = frame.step;
  const curve = (kind, value) => [kind, scene.frames.map((f) => [f.step, value(f)]).filter(([, y]) => Number.isFinite(y))];
  const curves = [["all", scene.evaluations ?? []], curve("seen", (f) => f.copyLoss), curve("accent", (f) => (isKnown(f, "losses") ? loss(f) : NaN))];
  fill(scene.frames.filter((f) => !isKnown(f, "losses")), losses);
  const parts = [heading("Loss, nats per token"), chart(curves, { now }), note(swatch("accent", "this text"),
    ...(panel.scores ? [swatch("seen", "copy of random tokens"), swatch("soft", "validation")] : []))];
  if (!panel.scores) return parts;
  const of = (n, kind) => curve(kind, (f) => f.panels[n].scores[score]);
  const others = range(frame.panels.length).filter((n) => n !== chosen).map((n) => of(n, "all"));
  return [...parts, heading("Score on the probe"), select("score", score, Object.entries(scene.scores).map(([key, [name]]) => [key, name])),
    chart([...others, of(chosen, "accent")], { level: scene.uniform[score], now, top: score === "distance" ? null : 1 }),
    note(swatch("accent", panel.name), swatch("soft", "the others"), swatch("seen", "uniform"))];
}

const SIDES = { // name, whether there is anything to show, what
  numbers: ["Numbers", () => true, numbersSide],
  next: ["Next token", () => state.frame.top || state.scene.model, nextSide],
  follow: ["Follow", () => state.scene.model, followSide],
  off: ["Switch off", () => state.panel.worth, offSide],
  compare: ["Compare", () => state.scene.model, compareSide],
  scores: ["Scores", () => state.panel.scores, scoresSide],
  training: ["Training", () => state.scene.frames.length > 1, trainingSide],
};
