// One position from bottom to top: what each part adds to the stream, and what it does to a token's logit.

// The embedding, every head and every MLP with what it adds at a position; their sum is the stream at the top
function parts({ gpt }, record, at) {
  const { n_layer, n_head: H, head_dim: D, n_embd: C } = gpt.config, stream = (n) => record.rows(record.streams[n], at, 1);
  const found = [{ name: "embedding", layer: -1, adds: stream(0) }];
  for (let layer = 0; layer < n_layer; layer++) {
    const y = record.rows(record.layers[layer].y, at, 1), c_proj = `blocks.${layer}.attn.c_proj`;
    const W = gpt.weights[`${c_proj}.weight`], bias = gpt.weights[`${c_proj}.bias`];
    for (let h = 0; h < H; h++) {
      const adds = Float32Array.from({ length: C }, (_, c) => {
        let total = 0;
        for (let d = h * D; d < (h + 1) * D; d++) total += W[c * H * D + d] * y[d];
        return total;
      });
      found.push({ name: `layer ${layer}, head ${h}`, layer, head: h, adds });
    }
    if (bias) found.push({ name: `layer ${layer}, bias`, layer, adds: bias });
    const after = stream(2 * layer + 2), before = stream(2 * layer + 1);
    found.push({ name: `layer ${layer}, MLP`, layer, adds: after.map((value, c) => value - before[c]) });
  }
  return found;
}

// What each part adds to a token's logit. The last norm divides all by one number, which is held fixed
function pushes(frame, at, id) {
  const { gpt } = frame, record = recordOf(state.scene, frame, state.scene.ids), { n_embd: C, n_layer } = gpt.config;
  const scale = gpt.weights["ln_f.weight"], bias = gpt.weights["ln_f.bias"];
  const score_C = gpt.weights["lm_head.weight"].subarray(id * C, (id + 1) * C), top = record.rows(record.streams[2 * n_layer], at, 1);
  const centred = (x) => (bias ? x.map((value) => value - mean([...x])) : x);
  const middle = centred(top), size = Math.sqrt(dot(middle, middle) / C + gpt.eps);
  const direction = score_C.map((value, c) => (value * scale[c]) / size);
  const found = parts(frame, record, at).map((part) => ({ ...part, push: dot(centred(part.adds), direction) }));
  return bias ? [...found, { name: "bias of the last norm", layer: n_layer, push: dot(bias, score_C) }] : found;
}

// The model's guess if it ended at a point of the stream (nostalgebraist, 2020, the logit lens)
function guess({ gpt }, x_C) {
  const logits = gpt.linear("lm_head", gpt.norm("ln_f", x_C), 1), total = logSumExp(logits);
  const best = logits.reduce((most, z, id) => (z > logits[most] ? id : most), 0);
  return { best, chance: (id) => Math.exp(logits[id] - total) };
}

const signedMeter = (value, most) => el("span", { className: "meter middle" }, el("i", { style: {
  background: `var(--${value < 0 ? "seen" : "accent"})`, width: `${50 * Math.abs(value / most)}%`, left: `${50 + 50 * Math.min(0, value / most)}%` } }));

function followSide() {
  const { scene, frame, row: at } = state, { ids, model: { names } } = scene, found = prediction(frame, at);
  const listed = [...new Set([...(at + 1 < ids.length ? [ids[at + 1]] : []), ...found.ids.slice(0, 10)])];
  const token = listed.find((id) => id === Number(state.token)) ?? listed[0], all = pushes(frame, at, token);
  const largest = (pushed) => Math.max(1e-9, ...pushed.map(Math.abs)), most = largest(all.map(({ push }) => push)), { record } = frame;
  const stages = range(scene.model.config.n_layer + 1).reverse();
  const layers = stages.map((n) => sum(all.filter(({ layer }) => layer === n - 1).map(({ push }) => push)));
  const steps = stages.map((n, k) => {
    const { best, chance } = guess(frame, record.rows(record.streams[2 * n], at, 1));
    return [n ? `layer ${n - 1}` : "embedding", names[best], show(chance(best), 2), show(chance(token), 3),
      signedMeter(layers[k], largest(layers)), signed(layers[k], 2)];
  });
  const strongest = [...all].sort((a, b) => Math.abs(b.push) - Math.abs(a.push)).slice(0, 12).map((part) =>
    [link(part), signedMeter(part.push, most), signed(part.push, 2)]);
  return [
    p("At ", b(quoted(names[ids[at]])), ` (${at}), what speaks for `, select("token", token, listed.map((id) => [id, quoted(names[id])])), "?"),
    table(["after", "best guess", "p", short(quoted(names[token]), 9), "push", ""], steps),
    note("Bottom to top: the guess if the model ended there (logit lens), and what the layer adds to the token's logit."),
    heading("Strongest parts"),
    table(["part", "", "logit"], [...strongest, ["all together", "", show(sum(all.map(({ push }) => push)), 2)]], -1, strongest.length),
    note("The model's logit is ", b(show(logitsAt(record, at)[token], 2), "logit"), ": the sum is exact, with the divisor of the "
      + "last norm held fixed."),
  ];
}

// A part's name, which opens the head if it is one
const link = ({ layer, head, name }) => {
  const panel = state.frame.panels.find((other) => other.row === layer && other.head === head);
  return panel ? button(name.replace(/\W/g, ""), name, () => choosePanel(panel)) : name;
};
