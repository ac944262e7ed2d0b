// Two texts side by side: which heads change, and how far apart the two vectors of one word are.

const compares = () => state.side === "compare" && Boolean(state.scene.other?.length);

// The position in the other text of each position here, or null: tokens that the longest common subsequence
// pairs, and those between two pairs if there are as many in both texts ("tired" and "wide")
function partners({ ids, other }) {
  const [n, m] = [ids.length, other.length], common = range(n + 1).map(() => new Uint16Array(m + 1)), found = Array(n).fill(null);
  for (let i = n - 1; i >= 0; i--)
    for (let j = m - 1; j >= 0; j--)
      common[i][j] = ids[i] === other[j] ? 1 + common[i + 1][j + 1] : Math.max(common[i + 1][j], common[i][j + 1]);
  let i = 0, j = 0, from = 0, to = 0;
  for (;;) {
    const isPair = ids[i] === other[j]; // at the end of both texts, too
    if (isPair && i - from === j - to) for (let k = from; k < i; k++) found[k] = j - i + k;
    if (isPair && i === n) return found;
    if (isPair) {
      found[i++] = j++;
      [from, to] = [i, j];
    } else if (j === m || (i < n && common[i + 1][j] >= common[i][j + 1])) i++;
    else j++;
  }
}

const pairsOf = (frame) => memo(frame, "pairs", () => partners(state.scene));

// By how much more weight a head gives in the other text; null where that has no such pair
function difference(panel, i, j) {
  const { frame } = panel, pairs = pairsOf(frame), [y, x] = [pairs[i], pairs[j]];
  if (y === null || x === null || x > y) return null;
  return frame.second.layers[panel.row].weights[panel.head][(y * (y + 1)) / 2 + x] - weight(panel, i, j);
}

// Half the sum of |differences|, over the queries that have a partner: 0 if a head does the same, 1 if all weight moved
function moved(panel) {
  return memo(panel, "moved", () => mean(range(state.scene.ids.length).map((i) =>
    sum(range(i + 1).map((j) => Math.abs(difference(panel, i, j) ?? 0))) / 2)));
}

// Where the other text has the token at a position: its partner, or the last of its kind
function sameWord(at) {
  const { ids, other } = state.scene, pair = pairsOf(state.frame)[at];
  return other[pair] === ids[at] ? pair : other.lastIndexOf(ids[at]);
}

function compareSide() {
  const { scene, frame, row: at } = state, box = (scene.box ??= el("textarea", { ariaLabel: "the other text",
    placeholder: "Type it with another word", data: { key: "other" }, tabIndex: 0 }));
  box.oninput = () => {
    const ids = encoded(box.value);
    if (!ids && box.value) return;
    Object.assign(scene, { other: ids?.slice(-scene.model.capacity), version: scene.version + 1 });
    update({});
  };
  const start = [p("This text and another"), box];
  if (!compares()) return start;
  const panels = [...frame.panels].sort((a, b) => moved(b) - moved(a)), most = moved(panels[0]) || 1;
  return [
    ...start,
    heading("Heads that change most"),
    table(["head", "", "weight that moved"], panels.slice(0, 6).map((panel) => [link({ ...panel, layer: panel.row }), meter(moved(panel), most), show(moved(panel), 3)])),
    ...wordSide(at, sameWord(at)),
  ];
}

// One word in two contexts: the same vector at the bottom, and then further and further apart
function wordSide(at, there) {
  const { scene, frame } = state, word = quoted(scene.axes[0].queries[at]);
  if (there < 0) return [note(`The other text has no ${word}: choose a token that both have, to see its two vectors part.`)];
  const { record, second } = frame, here = parts(frame, record, at), others = parts(frame, second, there);
  const changes = here.map((part, n) => ({ ...part, change: part.adds.map((value, c) => others[n].adds[c] - value) }));
  const size = (x) => Math.sqrt(dot(x, x));
  const rows = record.streams.filter((_, n) => n % 2 === 0).map((stream, n) => {
    const a = record.rows(stream, at, 1), b = second.rows(second.streams[2 * n], there, 1);
    const apart = size(a.map((value, c) => value - b[c])) / ((size(a) + size(b)) / 2);
    return [n ? `layer ${n - 1}` : "embedding", meter(apart, 1.5), show(apart, 3), show(dot(a, b) / size(a) / size(b), 3)];
  });
  const whole = changes[0].change.map((_, c) => sum(changes.map(({ change }) => change[c]))), total = dot(whole, whole);
  const shares = changes.map((part) => ({ ...part, share: total ? dot(part.change, whole) / total : 0 })).sort((a, b) => b.share - a.share);
  return [
    heading(`${word} here (${at}) and there (${there})`),
    table(["after", "", "distance", "cosine"], rows.reverse()),
    note("Part of the mean length."),
    heading("What moved them apart"),
    table(["part", "", "share"], shares.slice(0, 6).map((part) => [link(part), meter(part.share, 1), `${show(100 * part.share, 1)} %`])),
    note("All parts add up to 100 %."),
  ];
}
