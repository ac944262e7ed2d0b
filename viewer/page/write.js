// What the model writes: a token is drawn from what the last position predicts, and becomes text.

// Probabilities after temperature, top-k, top-p and min-p, as in sampling/choose.py; and how many are kept
function distribution({ logits, rank, loss, sum: logTotal }) {
  const { temperature, topK, topP, minP } = state, scale = temperature || 1e-9; // at 0 the likeliest is left
  const total = temperature ? logTotal(temperature) : logits[0] / scale;
  const chance = (z) => Math.exp(z / scale - total), chances = logits.map(chance);
  let kept = topK ? logits.filter((z) => z >= logits[topK - 1]).length : logits.length;
  let mass = topK || !temperature ? sum(chances.slice(0, kept)) : 1;
  if (topP < 1) {
    let before = 0, n = 0;
    while (n < kept && before < topP * mass) before += chances[n++];
    mass = n < kept || topK ? before : Math.max(before, topP); // the rest is beyond the list
    kept = n;
  }
  if (minP) {
    kept = chances.slice(0, kept).filter((c) => c >= minP * chances[0]).length;
    mass = sum(chances.slice(0, kept));
  }
  const isCut = (n) => (topK > 0 || topP < 1 || minP > 0) && n >= kept, right = logTotal(1) - loss;
  return { kept, chances: chances.map((c, n) => (isCut(n) ? 0 : c / mass)),
    truth: rank < 0 ? NaN : !isCut(rank) ? chance(right) / mass : topK || kept < chances.length ? 0 : NaN };
}

// A number from [0, 1) for the n-th token with a seed (mulberry32). It is not the one that PyTorch draws
function randomNumber(seed, n) {
  let bits = (Math.imul(seed, 0x9e3779b1) + Math.imul(n + 1, 0x6d2b79f5)) | 0;
  bits = Math.imul(bits ^ (bits >>> 15), bits | 1);
  bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
  return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
}

// Append one token. A text that fills the context goes on from its latest half, which is read again
function writeToken() {
  const { scene, frame, seed } = state, { all, ids, tokenizer, model } = scene;
  const found = prediction(frame, ids.length - 1), { chances } = distribution(found);
  const usable = found.ids.map((id, n) => (id < tokenizer.size ? chances[n] : 0)); // the vocabulary may be padded
  let left = randomNumber(seed, all.length) * sum(usable), n = usable.findIndex((c) => (left -= c) < 0);
  if (n < 0) n = usable.findLastIndex((c) => c > 0);
  goOn([...all, found.ids[n]], model.capacity - ids.length ? ids.length + 1 : Math.ceil(model.capacity / 2));
}

// Let a text be these tokens, of which the model sees the last
function goOn(all, last) {
  const { scene } = state;
  take(scene, all, last);
  $("typed").value = scene.tokenizer.decode(all);
}

// Cut the text after a position, and go on with a token
function branch(at, id) {
  const { all, ids } = state.scene;
  goOn([...all.slice(0, all.length - ids.length + at + 1), id]);
  chooseLast();
}

const chooseLast = () => choose(state.scene.ids.length - 1);

// Half of the time goes to the model and half to the views, so that a fast model does not wait for them
async function write() {
  if ((state.writing = !state.writing)) state.side = "next";
  for (let shown = 0; state.writing; ) {
    const begun = performance.now();
    do writeToken(); while (performance.now() - begun < shown);
    const written = performance.now();
    chooseLast();
    shown = performance.now() - written;
    await new Promise(requestAnimationFrame);
  }
  render();
}

function nextSide() {
  const { scene, frame, row: at, panel } = state, found = prediction(frame, at), { truth, rank } = found, bars = el("div", {});
  const listed = found.logits.length, button = (key, name, title, onclick) =>
    el("button", { className: "switch", data: { key }, tabIndex: 0, title, onclick }, name);
  state.topK = Math.min(state.topK, listed);
  const redraw = () => {
    const { kept, chances, truth: chance } = distribution(found);
    bars.replaceChildren(
      table(["token", "", "probability"], found.names.map((name, k) => [
        el(found.ids ? "button" : "span", { className: k === rank ? "right" : "", title: "go on with it",
          onclick: () => found.ids && branch(at, found.ids[k]) }, name + (k === rank ? "  ✓" : "")),
        meter(chances[k], 1), show(chances[k])])),
      note(kept === listed && !state.topK ? "" : `One of ${kept} tokens is drawn.`),
      truth === null ? p("The text ends here.") : p("The text goes on with ", b(quoted(truth)), `, ranked ${rank + 1}: probability `,
        b(show(chance), "truth"), ", loss ", b(show(found.loss), "loss"), " nats."));
  };
  redraw();
  return [
    scene.model ? el("div", { id: "write" }, button("write", state.writing ? "■ Stop" : "▶ Write", "key W", write),
      button("one", "One token", "key N", () => [writeToken(), chooseLast()])) : null,
    p(panel.axis.self ? "After " : "In place of ", b(quoted(panel.axis.queries[at])), ` (${at}) the model predicts`),
    bars,
    slider("temperature", "temperature", scene.model ? 0 : 0.1, 2, 0.1, redraw),
    slider("top-k", "topK", 0, Math.min(listed, 100), 1, redraw, "all"),
    slider("top-p", "topP", 0.05, 1, 0.05, redraw),
    slider("min-p", "minP", 0, 0.5, 0.01, redraw),
    scene.model ? slider("seed", "seed", 0, 99, 1, redraw) : null,
    note("They change what the model writes, not its loss."),
  ].filter(Boolean);
}
