// Two worked examples from texts about attention, shown as a model is, with every number right.
//
// The first is a walk-through in PyTorch: two texts of four tokens, two channels, one head. The second takes
// three words as their own queries, keys and values, and asks what "sat" attends to. Printed versions of it,
// without scale and mask, say 0.26, 0.39, 0.35; the weights are 0.29, 0.38, 0.34.

// torch.manual_seed(42); torch.randn(2, 4, 2); then nn.Linear(2, 2) for query, key and value: weight and bias
const TEXTS = [
  [[1.926915, 1.487284], [0.900717, -2.105521], [0.678418, -1.234545], [-0.043067, -1.604667]],
  [[-0.752135, 1.648723], [-0.392479, -1.403607], [-0.727881, -0.559430], [-0.768839, 0.762445]],
];
const LINEAR = [
  [[[0.545099, 0.104517], [-0.330106, 0.180240]], [-0.325790, -0.082924]],
  [[[-0.287197, 0.469074], [-0.558169, -0.325984]], [-0.199669, -0.425164]],
  [[[0.066739, -0.698395], [0.638595, -0.600665]], [0.545906, 0.117676]],
];
const WORDS_SAT = [[0.2, 0.8, 0.1], [0.9, 0.3, 0.7], [0.4, 0.6, 0.5]];

// softmax(q·k / scale) v, with or without the mask, as a panel of a scene
function example(row, name, axes, axis, [q, k, v]) {
  const rows = q.map((query, i) => {
    const powers = k.map((key, j) => (axis.causal && j > i ? 0 : Math.exp(dot(query, key) / axis.scale)));
    return powers.map((power) => power / sum(powers));
  });
  const o = rows.map((weights) => v[0].map((_, c) => sum(weights.map((w, j) => w * v[j][c]))));
  const flat = Object.entries({ q, k, v, o, w: rows }).map(([key, list]) => [key, Float32Array.from(list.flat())]);
  return { row, name, axes, decoded: Object.fromEntries(flat) };
}

function examplesScene() {
  const names = range(4).map((n) => `token ${n}`), words = ["The", "cat", "sat"];
  const axes = [{ queries: names, keys: names, causal: true, scale: Math.sqrt(2) },
    ...[[false, 1], [true, 1], [true, Math.sqrt(3)]].map(([causal, scale]) => ({ queries: words, keys: words, causal, scale }))];
  const projected = (text) => LINEAR.map(([W, b]) => text.map((x) => W.map((w, n) => dot(w, x) + b[n])));
  const titles = ["as printed: no scale, no mask", "with the mask", "with mask and 1/√d, as in a GPT"];
  const panels = [...TEXTS.map((text, n) => example(0, `text ${n}`, 0, axes[0], projected(text))),
    ...titles.map((title, n) => example(1, title, n + 1, axes[n + 1], [WORDS_SAT, WORDS_SAT, WORDS_SAT]))];
  return { name: "Worked examples", rows: ["4 tokens, 2 channels", "The cat sat"], axes, notices: [], frames: [{ step: 0, panels }],
    about: "Small enough to check by hand. The weights of “sat” are often printed as 0.26, 0.39, 0.35; they are 0.29, 0.38, 0.34." };
}
