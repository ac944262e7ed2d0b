// What tests/test_page_model.py asks a page, in terms of the page's own functions.

const now = () => recordOf(state.scene, state.frame, state.scene.ids);
const split = (numbers, width, n) => range(n).map((t) => [...numbers.subarray(t * width, (t + 1) * width)]);
const AS_OPENED = { temperature: 1, topK: 0, topP: 1, minP: 0, seed: 1, side: "numbers" };

// Turn to a scene, as it was before any test, and let it read a text
function see(n, text) {
  Object.assign(state, AS_OPENED);
  Object.assign(scenes[n], { other: null, box: null }).off.clear();
  openScene(scenes[n]);
  read(text);
}

function read(text) {
  take(state.scene, encoded(text));
  chooseLast();
}

const allLogits = () => split(now().logits, state.scene.model.config.vocab_size, state.scene.ids.length);

// q, k, v, outputs and weights of all heads
function heads() {
  const positions = range(state.scene.ids.length);
  return state.frame.panels.map((panel) => [
    ...["q", "k", "v", "o"].map((key) => positions.map((t) => row(panel, key, t))),
    positions.map((i) => positions.map((j) => weight(panel, i, j)))]);
}

// The largest difference of two records, of all that they hold of n positions
function apart(a, b, n) {
  const rows = (record) => [record.logits, ...record.streams, ...record.layers.flatMap(({ q, k, v, y }) => [q, k, v, y])]
    .flatMap((array) => [...record.rows(array, 0, n)]);
  const triangles = ({ layers }) => layers.flatMap(({ weights }) => weights.flatMap((w) => [...w.subarray(0, (n * (n + 1)) / 2)]));
  const ours = [...rows(a), ...triangles(a)], others = [...rows(b), ...triangles(b)];
  return ours.reduce((most, value, i) => Math.max(most, Math.abs(value - others[i])), 0);
}

// How far what is kept of a text is from what is computed anew, from `step` tokens at once
function apartFromNew(step) {
  const { ids, off, model: { config, capacity } } = state.scene, record = new Record(config, capacity);
  for (let start = 0; start < ids.length; start += step) state.frame.gpt.read(ids.slice(start, start + step), record, off);
  return apart(now(), record, ids.length);
}

// How many tokens the model reads for each of some texts
function counted(texts) {
  const { gpt } = state.frame, counts = [];
  gpt.read = function (tokens, ...rest) {
    counts.push(tokens.length);
    GPT.prototype.read.call(this, tokens, ...rest);
  };
  for (const text of texts) read(text);
  delete gpt.read;
  return counts;
}

function written(n) {
  for (const _ of range(n)) writeToken();
  showWritten();
  return state.scene.all;
}

// Ids and their probabilities, at some positions
function cut(settings, n) {
  Object.assign(state, settings);
  return range(n).map((at) => {
    const { ids, logits } = prediction(state.frame, at);
    return [ids, distribution(logits)];
  });
}

// What is written next with 100 seeds at 30 places, whose context is the same
function drawn(settings) {
  Object.assign(state, settings);
  const { scene } = state, { ids } = scene;
  const found = range(30).flatMap((n) => range(100).map((seed) => {
    state.seed = seed;
    take(scene, [...Array(n).fill(0), ...ids], ids.length);
    writeToken();
    return scene.all.at(-1);
  }));
  take(scene, ids);
  return found;
}

// Logits with which `size` tokens are alike, and ids beyond them far more likely
function favourPadding(size) {
  const record = now(), { vocab_size } = state.scene.model.config;
  record.logits.forEach((_, i) => (record.logits[i] = i % vocab_size < size ? 0 : 50));
  state.scene.version++;
}

// Rank, loss and names of what is predicted at each position but the last
const predicted = () => range(state.scene.ids.length - 1).map((at) => {
  const { rank, loss, names, truth } = prediction(state.frame, at);
  return [rank, loss, names, truth];
});

const allScores = () => state.frame.panels.map((panel) => scores(panel));

// The parts at a position with what each adds, and with its push for a token
const partsAt = (at) => parts(state.frame, now(), at).map(({ name, adds }) => [name, [...adds]]);
const pushesAt = (at, id) => pushes(state.frame, at, id).map(({ name, push }) => [name, push]);

// What the model would guess after the embedding and after each layer: the token, and all probabilities
const guesses = (at) => now().streams.filter((_, n) => n % 2 === 0).map((stream) => {
  const { best, chance } = guess(state.frame, now().rows(stream, at, 1));
  return [best, range(state.scene.model.config.vocab_size).map(chance)];
});

const differences = (panel) => {
  const positions = range(state.scene.ids.length);
  return positions.map((i) => positions.map((j) => (j > i ? null : difference(panel, i, j))));
};

// Controls that neither Tab nor the arrow keys from a place that Tab reaches can get to
function unreachable() {
  const all = [...document.querySelectorAll("button, input, select, textarea, canvas[role], [role=button]")];
  const isSeen = (node) => node.getClientRects().length > 0;
  const inGroup = ({ dataset: { key } }) => key && document.querySelector(`[data-key=${key}][tabindex="0"]`);
  return all.filter((node) => isSeen(node) && node.tabIndex < 0 && !inGroup(node)).map((node) => node.outerHTML);
}
