// Predictions, scores, heads switched off, and training.

// What sampling draws from: temperature, then top-k, then top-p
function distribution(frame, at) {
  const { temperature, topK, topP, scene: { temperatures } } = state, rows = frame.truth.length, rank = frame.ranks[at];
  const logits = row(frame, "logits", at, rows), sums = row(frame, "sums", at, rows);
  const chance = (z) => Math.exp(z / temperature - sums[temperatures.indexOf(temperature)]);
  const chances = logits.map(chance), truth = sums[temperatures.indexOf(1)] - tensor(frame, "losses")[at];
  let kept = topK ? logits.filter((z) => z >= logits[topK - 1]).length : logits.length;
  let mass = topK ? sum(chances.slice(0, kept)) : 1;
  if (topP < 1) {
    let before = 0, n = 0;
    while (n < kept && before < topP * mass) before += chances[n++];
    mass = n < kept || topK ? before : Math.max(before, topP); // the rest is beyond the list
    kept = n;
  }
  const isCut = (n) => (topK > 0 || topP < 1) && n >= kept;
  return { kept, chances: chances.map((c, n) => (isCut(n) ? 0 : c / mass)), truth: !isCut(rank) ? chance(truth) / mass : topK || kept < chances.length ? 0 : NaN };
}

function meter(value, most, tick = null) {
  const percent = (number) => `${100 * Math.max(0, Math.min(1, number / most))}%`;
  return el("span", { className: "meter" }, el("i", { style: { width: percent(value) } }),
    tick === null ? null : el("b", { style: { left: percent(tick) } }));
}

function slider(name, key, min, max, step, redraw) {
  const output = el("output", {}, state[key] || "all");
  const input = el("input", { type: "range", min, max, step, value: state[key], ariaLabel: name });
  input.oninput = () => {
    output.textContent = (state[key] = Number(input.value)) || "all";
    redraw();
  };
  return el("label", {}, el("span", {}, name), input, output);
}

function nextSide() {
  const { frame, row: at, panel } = state, bars = el("div", {}), truth = frame.truth[at], rank = frame.ranks[at];
  const listed = tensor(frame, "logits").length / frame.truth.length;
  state.topK = Math.min(state.topK, listed);
  const redraw = () => {
    const found = distribution(frame, at), isAll = found.kept === listed && !state.topK;
    bars.replaceChildren(
      table(["token", "", "probability"], frame.top[at].map((name, k) => [
        el("span", { className: k === rank ? "right" : "" }, name + (k === rank ? "  ✓" : "")),
        meter(found.chances[k], 1), show(found.chances[k])])),
      note(isAll ? "" : `One of ${found.kept} tokens is drawn.`),
      truth === null ? p("The text ends here.") : p("The right token is ", b(quoted(truth)), `, ranked ${rank + 1}: probability `,
        b(show(found.truth), "truth"), ", loss ", b(show(tensor(frame, "losses")[at]), "loss"), " nats."));
  };
  redraw();
  return [
    p(panel.axis.self ? "After " : "In place of ", b(quoted(panel.axis.queries[at])), ` (${at}) the model predicts`),
    bars,
    slider("temperature", "temperature", 0.1, 2, 0.1, redraw),
    slider("top-k", "topK", 0, listed, 1, redraw),
    slider("top-p", "topP", 0.05, 1, 0.05, redraw),
    note("These change what the model writes, not its loss."),
  ];
}

function scoresSide() {
  const { panel, scene } = state;
  const rows = Object.entries(scene.scores).map(([key, [name]]) => {
    const numbers = [0, 1].flatMap((n) => [panel.scores[key][n], scene.uniform[key][n]]);
    const most = key === "distance" ? 1.2 * Math.max(1, numbers[0], numbers[1]) : 1;
    return [name, meter(numbers[0], most, numbers[1]), ...numbers.map((x) => show(x, key === "distance" ? 1 : 2))];
  });
  return [
    p(b(panel.label ? scene.scores[panel.label][0] : "no label"), ": ", panel.why, "."),
    table(["score", "", "text", "uniform", "probe", "uniform"], rows),
    ...Object.values(scene.scores).map(([name, meaning]) => note(`${name}: ${meaning}`)),
    note("Orange: uniform attention. Probe: text that the model wrote or, for induction and duplicate token, "
      + "random tokens said twice: the lowest score over several periods."),
  ];
}

const tint = (change, most) => ({ background: `color-mix(in srgb, var(--${change > 0 ? "worse" : "better"}) `
  + `${Math.round(75 * Math.min(1, Math.abs(change) / most))}%, transparent)` });

function offSide() {
  const { panel, frame, scene } = state, { queries } = panel.axis, costs = [...tensor(panel, "costs")];
  const largest = (changes) => Math.max(0.05, ...changes.map(Math.abs)), losses = tensor(frame, "losses");
  const chips = costs.map((change, n) => el("span", { className: "token", style: tint(change, largest(costs)) }, queries[n + 1]));
  const worst = range(costs.length).sort((m, n) => Math.abs(costs[n]) - Math.abs(costs[m]));
  const means = frame.panels.map((other) => mean([...tensor(other, "costs")]));
  const heads = scene.rows.map((name, layer) => el("tr", {}, el("td", {}, name), ...frame.panels.flatMap((other, n) =>
    other.row !== layer ? [] : el("td", { style: { ...tint(means[n], largest(means)), fontWeight: other === panel ? 700 : 400 } },
      signed(means[n], 2)))));
  return [
    p(`Without ${panel.name} the loss of this text goes from ${show(frame.loss)} to `, b(show(frame.loss + mean(costs)), "off"),
      ` nats per token (${signed(mean(costs))}).`),
    note(`On text that the model wrote ${signed(panel.worth[0])}, on a copy of random tokens ${signed(panel.worth[1])}.`),
    el("div", { className: "strip" }, el("span", { className: "token soft" }, queries[0]), ...chips),
    note(swatch("worse", "harder to predict"), swatch("better", "easier")),
    scroll(table(["most changed", "with", "without", "change"], worst.map((n) =>
      [`${n + 1} ${queries[n + 1]}`, show(losses[n], 3), show(losses[n] + costs[n], 3), signed(costs[n])]))),
    heading("Mean change without each head"),
    el("table", { className: "dense" }, ...heads),
  ];
}

function trainingSide() {
  const { scene, frame, panel, score } = state, chosen = frame.panels.indexOf(panel), now = frame.step;
  const curve = (kind, value) => [kind, scene.frames.map((f) => [f.step, value(f)]).filter(([, y]) => y !== null)];
  const losses = [["all", scene.evaluations ?? []], curve("seen", (f) => f.copyLoss ?? null), curve("accent", (f) => f.loss)];
  const parts = [heading("Loss, nats per token"), chart(losses, { now }), note(swatch("accent", "this text"),
    ...(panel.scores ? [swatch("seen", "copy of random tokens"), swatch("soft", "validation")] : []))];
  if (!panel.scores) return parts;
  const pick = el("select", { ariaLabel: "score", data: { key: "score" }, tabIndex: 0, onchange: () => update({ score: pick.value }) },
    ...Object.entries(scene.scores).map(([value, [name]]) => el("option", { value, selected: value === score }, name)));
  const of = (n, kind) => curve(kind, (f) => f.panels[n].scores[score][1]);
  const others = range(frame.panels.length).filter((n) => n !== chosen).map((n) => of(n, "all"));
  return [...parts, heading("Score on the probe"), pick,
    chart([...others, of(chosen, "accent")], { level: scene.uniform[score][1], now, top: score === "distance" ? null : 1 }),
    note(swatch("accent", panel.name), swatch("soft", "the others"), swatch("seen", "uniform"))];
}

const SIDES = { // name, whether there is anything to show, what
  numbers: ["Numbers", () => true, numbersSide],
  next: ["Next token", () => state.frame.top, nextSide],
  scores: ["Scores", () => state.panel.scores, scoresSide],
  off: ["Switch off", () => state.panel.costs, offSide],
  training: ["Training", () => state.scene.frames.length > 1, trainingSide],
};
