"""Byte-level byte-pair encoding: learn a vocabulary from text.

Start from the 256 bytes, and repeatedly merge the most frequent pair of neighbours into a new
token. Source: Sennrich et al. 2016 (arXiv:1508.07909); on bytes, GPT-2 (Radford et al. 2019).
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

import regex

Pair = tuple[int, int]

# A longer pre-token is a blob of data, not a word, and teaches nothing. Every merge in it walks
# over all of it: a single one of 300,000 letters makes training 40 times as slow.
LONGEST_PRETOKEN = 128  # characters
# Bounds the memory: when there are twice as many, the rarest are forgotten. The Python standard
# library has 50,000; text without spaces has far more.
MOST_PRETOKENS = 60_000
FEWEST_OCCURRENCES = 2  # a pair that occurs once is not a pattern


def train_bpe(texts: Iterable[str], n_ranks: int, pattern: str) -> dict[bytes, int]:
    """Return at most `n_ranks` tokens with their ranks: the 256 bytes, then the merges in order.

    `pattern` cuts the texts into pre-tokens, and no token crosses their borders. Of pairs that are
    equally frequent, the one with the smaller ids is merged first, as in rustbpe. Pairs that occur
    once are not merged. `aaabdaaabac` -> aa (occurs 4 times), ab (2), aaab (2)
    """
    words = Words(count_pretokens(texts, pattern))
    # One entry per pair. Its count may be out of date, but is never too low: a merge lowers the
    # counts of old pairs, and raises only those of pairs with the new token, which it pushes.
    heap = [(-count, pair) for pair, count in words.pair_counts.items()]
    heapq.heapify(heap)

    tokens = [bytes([byte]) for byte in range(256)]
    while heap and len(tokens) < n_ranks:
        _, pair = heap[0]
        count = words.pair_counts[pair]
        if heap[0] != (-count, pair):
            heapq.heapreplace(heap, (-count, pair))
            continue
        if count < FEWEST_OCCURRENCES:
            break
        heapq.heappop(heap)
        for new_pair in words.merge(pair, new_token=len(tokens)):
            heapq.heappush(heap, (-words.pair_counts[new_pair], new_pair))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return {token: rank for rank, token in enumerate(tokens)}


def count_pretokens(texts: Iterable[str], pattern: str) -> Counter[str]:
    """Count the distinct pre-tokens, so that each is merged once and not at every occurrence."""
    find = regex.compile(pattern).finditer
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(m.group() for m in find(text) if m.end() - m.start() <= LONGEST_PRETOKEN)
        if len(counts) > 2 * MOST_PRETOKENS:
            counts = Counter(dict(counts.most_common(MOST_PRETOKENS)))
    return counts


class Words:
    """The distinct pre-tokens as lists of token ids, with counts of their pairs of neighbours."""

    def __init__(self, counts: Counter[str]):
        self.words = [list(word.encode()) for word in counts]
        self.repeats = list(counts.values())
        self.pair_counts: Counter[Pair] = Counter()
        self.words_with: defaultdict[Pair, set[int]] = defaultdict(set)
        for i, word in enumerate(self.words):
            self._count(i, +1)
            for pair in pairwise(word):
                self.words_with[pair].add(i)

    def merge(self, pair: Pair, new_token: int) -> set[Pair]:
        """Make `pair` one token in all words; return the new pairs that this creates."""
        new_pairs: set[Pair] = set()
        for i in self.words_with.pop(pair):
            self._count(i, -1)
            self.words[i] = merge_pair(self.words[i], pair, new_token)
            self._count(i, +1)
            for new_pair in (p for p in pairwise(self.words[i]) if new_token in p):
                self.words_with[new_pair].add(i)
                new_pairs.add(new_pair)
        return new_pairs

    def _count(self, i: int, sign: int) -> None:
        """Add the pairs of word `i` to the counts, or subtract them."""
        for pair in pairwise(self.words[i]):
            self.pair_counts[pair] += sign * self.repeats[i]


def merge_pair(word: list[int], pair: Pair, new_token: int) -> list[int]:
    """Replace each `pair`, from left to right: [1, 2, 3, 1, 2], (1, 2), 4 -> [4, 3, 4]."""
    merged: list[int] = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new_token
        else:
            merged.append(token)
    return merged
