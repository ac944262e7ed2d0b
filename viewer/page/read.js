// The model that the page runs: from a text to what the views show of it.

// A scene that has a model computes its numbers; the others bring them along
function wake(scene) {
  const axis = { causal: true, self: true, scale: scene.scale };
  Object.assign(scene, { axes: [axis], tokenizer: makeTokenizer(scene.model.tokenizer), off: new Set(), version: 0 });
  for (const frame of scene.frames)
    for (const panel of frame.panels) Object.assign(panel, { frame, axis, key: `${panel.row}.${panel.head}` });
  take(scene, scene.ids);
}

// From now on these tokens are the text, of which the page shows, and the model sees, the last
function take(scene, all, last = scene.model.capacity) {
  const ids = all.slice(-last), names = ids.map((id) => scene.model.names[id]);
  Object.assign(scene, { all, ids, version: scene.version + 1 });
  Object.assign(scene.axes[0], { queries: names, keys: names });
}

// A record of a text by the model of a checkpoint. What it holds already is not computed again
function recordOf(scene, frame, ids, name = "record") {
  const { config, capacity } = scene.model, off = [...scene.off].join();
  frame.gpt ??= new GPT(config, unpackWeights(frame.weights));
  frame.weights = null;
  if (frame[name]?.off !== off) frame[name] = Object.assign(new Record(config, capacity), { off });
  const record = frame[name], same = equalStart(record.tokens, ids);
  record.tokens.length = same;
  if (same < ids.length) frame.gpt.read(ids.slice(same), record, scene.off);
  return record;
}

function equalStart(a, b) {
  const n = a.findIndex((token, i) => token !== b[i]);
  return n < 0 ? a.length : n;
}

// What is computed for a frame or a panel stays until the text, or what is switched off, changes
function memo(holder, name, compute) {
  const { version } = state.scene;
  if (!holder.memo || holder.memo.version !== version) holder.memo = { version };
  return (holder.memo[name] ??= compute());
}

// ln Σ exp(z)
function logSumExp(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b));
  let total = 0;
  for (const z of logits) total += Math.exp(z - most);
  return most + Math.log(total);
}

const logitsAt = (record, t) => {
  const width = record.logits.length / record.capacity;
  return record.logits.subarray(t * width, (t + 1) * width);
};

// The loss of each token but the first, in nats
function lossesIn(record) {
  return record.tokens.slice(1).map((token, t) => logSumExp(logitsAt(record, t)) - logitsAt(record, t)[token]);
}

function losses(frame) {
  if (!state.scene.model) return tensor(frame, "losses").subarray(0, frame.truth.length - 1);
  return memo(frame, "losses", () => lossesIn(recordOf(state.scene, frame, state.scene.ids)));
}

const loss = (frame) => mean([...losses(frame)]);

// By how much each loss rises without a head, if it is off by how much it has: a pass from the head's layer on
function costs(panel) {
  const { scene } = state, { frame, row: layer } = panel;
  if (!scene.model) return [...tensor(panel, "costs")];
  return memo(panel, "costs", () => {
    const { ids, off, model: { config } } = scene, below = recordOf(scene, frame, ids).streams[2 * layer];
    const other = new Record(config, ids.length), sign = off.has(panel.key) ? -1 : 1, toggled = new Set([...off, panel.key]);
    if (sign < 0) toggled.delete(panel.key);
    other.streams[2 * layer].set(below.subarray(0, ids.length * config.n_embd));
    frame.gpt.read(ids, other, toggled, layer);
    return lossesIn(other).map((nats, n) => sign * (nats - losses(frame)[n]));
  });
}

// What a position predicts: tokens, the likeliest first; the right one, its rank and its loss
function prediction(frame, at) {
  const { scene } = state, { ids, model } = scene;
  if (!model) {
    const { top, truth, ranks } = frame, chances = row(frame, "chances", at, top.length);
    return { names: top[at], chances, truth: truth[at], rank: ranks[at], loss: tensor(frame, "losses")[at] };
  }
  return memo(frame, `prediction ${at}`, () => {
    const all = logitsAt(recordOf(scene, frame, ids), at), token = ids[at + 1]; // ids from size on are padding
    const order = range(scene.tokenizer.size).sort((a, b) => all[b] - all[a] || a - b), logits = order.map((id) => all[id]);
    return { ids: order, logits, names: order.slice(0, 10).map((id) => model.names[id]), truth: model.names[token] ?? null,
      rank: order.indexOf(token), loss: logSumExp(all) - all[token] };
  });
}

// Scores of weights w(i, j), as in viewer/scores.py: most are the mean weight on what counts as a hit
const HITS = {
  previous: (i, j) => j === i - 1,
  current: (i, j) => j === i && i > 0,
  first: (i, j) => j === 0 && i > 0,
  duplicate: (i, j, ids) => j < i && ids[j] === ids[i],
  induction: (i, j, ids) => j > 0 && j < i && ids[j - 1] === ids[i],
};
const MOST_TELLING = ["current", "first", "column", "previous", "duplicate", "induction", "subject", "object", "adjective"];
const OTHER_SCORES = {
  column: (rows) => Math.max(...range(Math.ceil(rows.length / 2)).map((j) => (j ? mean(rows.slice(j + 1).map((row) => row[j])) : rows.length > 1 ? 0 : NaN))),
  entropy: (rows) => mean(rows.slice(1).map((row, i) => sum(row.map((w) => (w > 0 ? -w * Math.log(w) : 0))) / Math.log(i + 2))),
  distance: (rows) => mean(rows.map((row, i) => sum(row.map((w, j) => w * (i - j))))),
};

function scoreOf(name, rows, ids) {
  if (OTHER_SCORES[name]) return OTHER_SCORES[name](rows);
  if (!HITS[name]) return NaN; // only the words of the probes have known roles
  const found = rows.flatMap((row, i) => {
    const hits = row.filter((_, j) => HITS[name](i, j, ids));
    return hits.length ? [sum(hits)] : [];
  });
  return mean(found);
}

const rowsOf = (panel) => panel.axis.queries.map((_, i) => range(i + 1).map((j) => weight(panel, i, j)));

// Name -> the score on this text, that of uniform attention, the score on the probes, and the same there
function scores(panel) {
  const { scene } = state, { ids } = scene;
  return memo(panel, "scores", () => {
    const rows = rowsOf(panel), alike = rows.map((row) => row.map(() => 1 / row.length));
    return Object.fromEntries(Object.keys(scene.scores).map((name) =>
      [name, [scoreOf(name, rows, ids), scoreOf(name, alike, ids), panel.scores[name], scene.uniform[name]]]));
  });
}

// Where a reader should look first: a labelled head, and a query at which it does what it is named after
function worthSeeing({ frames, ids }) {
  const { panels } = frames.at(-1);
  const best = panels.map((panel) => {
    const hit = HITS[panel.label] ?? ((i, j) => j > 0 && j < i);
    const cells = range(ids.length).flatMap((row) => range(row + 1).map((column) =>
      ({ panel, row, column, w: hit(row, column, ids) ? weight(panel, row, column) : 0 })));
    return cells.reduce((most, cell) => (cell.w > most.w ? cell : most));
  });
  const order = (cell) => (cell.w > 0.3 ? MOST_TELLING.indexOf(cell.panel.label) : -1) + cell.w; // a weak example shows nothing
  const { panel, row, column } = best.reduce((most, cell) => (order(cell) > order(most) ? cell : most));
  return { panel, row, column };
}
