// A short walk through the views, with the reader's own text.

const STOPS = [
  ["What a map shows", () => {
    const { panel, row: i, column: j } = state, { queries, keys } = panel.axis;
    return `Every head of every layer has one. A row is a token that asks, here ${quoted(queries[i])}; a column one that is asked. `
      + `It gives ${show(100 * weight(panel, i, j), 0)} % of its attention to ${quoted(keys[j])}. Click any cell.`;
  }, "numbers"],
  ["Where a weight comes from", () => "On the right: the query times the key, divided by √d, through the exponential, "
    + "divided by the sum over all keys.", "numbers"],
  ["What it is for", () => `After ${quoted(state.panel.axis.queries[state.row])} the model thinks `
    + `${quoted(prediction(state.frame, state.row).names[0])} the likeliest. Press Write, or click another token to go on with that.`, "next"],
  ["Who spoke for it", () => "From bottom to top: each layer's guess, and the heads and MLPs that pushed the token up or down.", "follow"],
  ["Take a head away", () => `Switch ${state.panel.name} off: the page computes everything anew without it, and says what that costs.`, "off"],
];

function walk(n) {
  const stop = STOPS[n], box = $("walk");
  box.hidden = !stop;
  if (!stop) return $("start").focus();
  update({ side: stop[2] });
  const next = button("next", n + 1 < STOPS.length ? "Next →" : "Done", () => walk(n + 1));
  box.replaceChildren(el("small", {}, `${n + 1} of ${STOPS.length}`), heading(stop[0]), p(stop[1]()), next, button("skip", "Skip", () => walk(-1)));
  box.onkeydown = ({ key }) => {
    const step = { ArrowRight: n + 1, ArrowLeft: Math.max(0, n - 1), Escape: -1 }[key];
    if (step !== undefined) walk(step);
  };
  (n ? $("right") : $("middle")).scrollIntoView(); // on a narrow screen
  next.focus();
}
