// What the model writes: a token is drawn from what the last position predicts, and becomes text.

// Probabilities after temperature, top-k, top-p and min-p, in turn as in sampling/choose.py; logits fall
function distribution(logits) {
  const { temperature, topK, topP, minP } = state, normal = (list, total = sum(list)) => list.map((c) => c / total);
  const powers = logits.map((z) => Math.exp((z - logits[0]) / (temperature || 1e-9))); // at 0 the likeliest is left
  let before = 0;
  const chances = normal(powers.map((c, n) => (topK && logits[n] < logits[topK - 1] ? 0 : c))).map((c) => {
    const kept = topP === 1 || before < topP ? c : 0;
    before += c;
    return kept;
  });
  return normal(chances.map((c) => (c >= minP * chances[0] ? c : 0)));
}

// A number from [0, 1) for the n-th token with a seed, mixed as in Wellons' lowbias32; not the one that PyTorch draws
function randomNumber(seed, n) {
  let bits = seed * 0x9e3779b1 + n;
  for (const factor of [0x7feb352d, 0x846ca68b]) bits = Math.imul(bits ^ (bits >>> 16), factor);
  return ((bits ^ (bits >>> 16)) >>> 0) / 2 ** 32;
}

// Append one token. A text that fills the context goes on from its latest half, which is read again
function writeToken() {
  const { scene, frame, seed } = state, { all, ids, model: { capacity } } = scene;
  const found = prediction(frame, ids.length - 1), chances = distribution(found.logits);
  let left = randomNumber(seed, all.length), n = chances.findIndex((c) => (left -= c) < 0);
  if (n < 0) n = chances.findLastIndex((c) => c > 0); // what rounding left over
  take(scene, [...all, found.ids[n]], ids.length < capacity ? ids.length + 1 : Math.max(1, capacity >> 1));
}

function showWritten() {
  const { all, tokenizer } = state.scene;
  $("typed").value = tokenizer.decode(all);
  $("typed").scrollTop = 1e9;
  chooseLast();
}

// Cut the text after a position, and go on with a token
function branch(at, id) {
  const { scene } = state, { all, ids } = scene;
  take(scene, [...all.slice(0, all.length - ids.length + at + 1), id]);
  showWritten();
}

function chooseLast() {
  choose(state.scene.ids.length - 1);
  $("text").scrollTop = 1e9;
}

function writeOne() {
  writeToken();
  showWritten();
}

// Half of the time goes to the model and half to the views, so that a fast model does not wait for them
async function write() {
  const mine = (state.writing = state.writing ? null : {}); // a loop that was stopped must not go on with the next
  if (mine) state.side = "next";
  for (let shown = 0; mine && state.writing === mine && $("typed").value.length < MOST_CHARACTERS; ) {
    const begun = performance.now();
    do writeToken(); while (performance.now() - begun < shown);
    const written = performance.now();
    showWritten();
    await new Promise(requestAnimationFrame);
    shown = performance.now() - written;
  }
  if (state.writing === mine) state.writing = null; // the box is full
  redraw(render);
}

function nextSide() {
  const { scene, frame, row: at, panel } = state, found = prediction(frame, at), { names, truth, rank } = found, bars = el("div", {});
  const redraw = () => {
    const chances = found.chances ?? distribution(found.logits), kept = chances.filter(Boolean).length;
    const name = (k) => (found.ids ? button(`go${k}`, names[k], () => branch(at, found.ids[k])) : names[k]);
    bars.replaceChildren(
      table(["token", "", "probability"], names.map((_, k) => [name(k), meter(chances[k], 1), show(chances[k])]), rank),
      note(kept < chances.length ? `One of ${kept} tokens is drawn.` : ""),
      truth === null ? p("The text ends here.") : p("The text goes on with ", b(quoted(truth)), `, ranked ${rank + 1}: probability `,
        b(show(found.ids ? chances[rank] : Math.exp(-found.loss)), "truth"), ", loss ", b(show(found.loss), "loss"), " nats."));
  };
  redraw();
  const before = at && scene.model ? logitsAt(frame.record, at - 1) : null;
  const chance = before ? `, of probability ${show(Math.exp(before[scene.ids[at]] - logSumExp(before)))},` : "";
  const after = p(panel.axis.self ? "After " : "In place of ", b(quoted(panel.axis.queries[at])), ` (${at})${chance} the model predicts`);
  if (!scene.model) return [after, bars];
  return [
    el("div", { className: "switch" }, button("write", state.writing ? "■ Stop" : "▶ Write", write, { title: "key W" }),
      button("one", "One token", writeOne, { title: "key N" })),
    after,
    bars,
    slider("temperature", "temperature", 0, 2, 0.1, redraw),
    slider("top-k", "topK", 0, Math.min(100, found.ids.length), 1, redraw, "all"),
    slider("top-p", "topP", 0.05, 1, 0.05, redraw),
    slider("min-p", "minP", 0, 0.5, 0.01, redraw),
    slider("seed", "seed", 0, 99, 1, redraw),
  ];
}
