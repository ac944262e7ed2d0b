// Every number behind a cell, in the order in which attention computes them.

// softmax(q·k/√d) v for query i
function attend(panel, i, j) {
  const { queries, keys, causal, scale } = panel.axis, S = keys.length, visible = range(causal ? i + 1 : S);
  const q = row(panel, "q", i, queries.length), k = row(panel, "k", j, S), v = row(panel, "v", j, S);
  const products = q.map((value, c) => value * k[c]);
  const scores = visible.map((s) => sum(row(panel, "k", s, S).map((value, c) => value * q[c])) / scale);
  const exponentials = scores.map(Math.exp), denominator = sum(exponentials);
  const weights = exponentials.map((e) => e / denominator);
  const values = visible.map((s) => row(panel, "v", s, S));
  const output = v.map((_, c) => sum(values.map((value, s) => weights[s] * value[c])));
  return { q, k, v, products, scores, exponentials, denominator, weights, visible, output };
}

const equation = (...parts) => el("p", { className: "equation" }, ...parts);
const scroll = (node) => el("div", { className: "scroll", tabIndex: 0 }, node);

function numbersSide() {
  const { panel, row: i, column: j } = state, { queries, keys, scale, causal } = panel.axis;
  const n = attend(panel, i, j), hidden = isMasked(panel, i, j), model = row(panel, "o", i, queries.length);
  const product = sum(n.products), score = product / scale, e = hidden ? 0 : Math.exp(score);
  const w = e / n.denominator, d = n.q.length, named = (name, value) => b(show(value), name);
  const channels = n.q.map((_, c) => [`${c}`, show(n.q[c]), show(n.k[c]), show(n.products[c])]);
  const asked = n.visible.map((s) => [keys[s], show(n.scores[s]), show(n.exponentials[s]), show(n.weights[s])]);
  const outputs = n.v.map((v, c) => [`${c}`, show(v), show(w * v), show(n.output[c]), show(model[c])]);
  const apart = Math.max(...n.output.map((value, c) => Math.abs(value - model[c])));
  return [
    p("How much does the query ", b(quoted(queries[i])), ` (${i}) attend to the key `, b(quoted(keys[j])), ` (${j})?`),
    equation("weight = e^s / Σ e^s,  s = q·k / √d"),
    heading("1 Query times key"),
    scroll(table(["channel", "q", "k", "q × k"], [...channels, ["sum", "", "", show(product)]], -1, d)),
    equation("q·k = ", named("product", product)),
    note(state.scene.turned ? "q and k are normalised and rotated." : ""),
    heading(scale === 1 ? "2 No scale in this example" : "2 Divide by √d: longer vectors have larger products"),
    equation(`s = ${show(product)} / ${scale === 1 ? 1 : "√" + d} = `, named("score", score)),
    heading("3 Mask"),
    equation(hidden ? "The key comes after the query: s = −∞." : causal ? "The key is not later: s stays as it is." : "None."),
    heading("4 Exponential and sum"),
    equation(`e^${hidden ? "−∞" : show(score)} = `, named("exponential", e)),
    scroll(table(["key", "s", "e^s", "weight"], asked, j)),
    equation("Σ e^s = ", named("denominator", n.denominator)),
    heading("5 Weight"),
    equation(`${show(e)} / ${show(n.denominator)} = `, named("weight", w), "; in the model ", named("model", weight(panel, i, j))),
    heading("6 Weight times value, summed over all keys"),
    scroll(table(["channel", "v", "weight × v", "sum", "in the model"], outputs)),
    note("The page computes in float64, the model in float32: they differ by at most ", named("apart", apart), ".",
      state.scene.off?.has(panel.key) ? " But this head is switched off, so that it passes on 0." : ""),
  ];
}
