// Text <-> token ids, as data/tokenizer.py has them. Bytes are a string of as many characters here.

// GPT-2's words. Its \s is White_Space; JavaScript's \s has U+FEFF too, and lacks U+0085
const WORDS = new RegExp("'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s"
  .replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}"), "gu");

// `size` tokens; ids from there on are padding of the model's vocabulary
function makeTokenizer({ kind, characters, tokens, end }) {
  const spelled = kind === "char" ? [...characters] : kind === "byte" ? range(256).map(byteOf) : tokens.map(atob);
  const ids = new Map(spelled.map((token, id) => [token, id]));
  if (end !== null) spelled[end] = "<|endoftext|>"; // how it is shown; no text encodes to it
  const join = (some) => Array.from(some, (id) => spelled[id]).join("");
  const size = spelled.length;
  return kind === "char"
    ? { size, encode: (text) => characterIds(text, ids), decode: join }
    : { size, encode: (text) => byteIds(text, ids), decode: (some) => utf8(join(some)) };
}

function characterIds(text, ids) {
  const missing = [...new Set(text)].filter((character) => !ids.has(character)).slice(0, 10);
  if (!missing.length) return Array.from(text, (character) => ids.get(character));
  const names = missing.map((character) => JSON.stringify(character)).join(", ");
  throw Error(`the character vocabulary lacks ${names}: use the characters of the training text`);
}

// Lone surrogates become U+FFFD. A word that is a token needs no merges, and might not be reached by them
function byteIds(text, ids) {
  return (text.match(WORDS) ?? []).flatMap((word) => {
    const bytes = Array.from(new TextEncoder().encode(word), byteOf), whole = ids.get(bytes.join(""));
    return whole === undefined ? merged(bytes, ids).map((token) => ids.get(token)) : whole;
  });
}

// Join the neighbours that are the token of the lowest rank, the leftmost of equals, until none are a token
function merged(parts, ids) {
  const rank = (i) => (i + 1 < parts.length ? ids.get(parts[i] + parts[i + 1]) : undefined) ?? Infinity;
  const ranks = parts.map((_, i) => rank(i));
  for (;;) {
    let best = 0;
    for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
    if (ranks[best] === Infinity) return parts;
    parts.splice(best, 2, parts[best] + parts[best + 1]);
    ranks.splice(best, 1);
    ranks[best] = rank(best);
    if (best) ranks[best - 1] = rank(best - 1);
  }
}

const byteOf = (number) => String.fromCharCode(number);

// U+FFFD stands for bytes that are not UTF-8, and a leading U+FEFF is kept, as in Python
function utf8(bytes) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return decoder.decode(Uint8Array.from(bytes, (byte) => byte.charCodeAt(0)));
}
