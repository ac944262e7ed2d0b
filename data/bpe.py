"""Byte-level byte-pair encoding: learn a vocabulary from text.

Start from the 256 bytes, and time and again make the most frequent pair of neighbours one new
token. Source: Sennrich et al. 2016 (arXiv:1508.07909), on bytes as in GPT-2 (Radford et al. 2019).
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

import regex

Pair = tuple[int, int]

# A longer pre-token is a blob of data, not a word: it teaches nothing, and because every merge in
# it walks over the whole of it, a single one of 300,000 letters makes training 40 times as slow.
LONGEST_PRETOKEN = 128  # characters
# Bounds memory: beyond twice as many distinct ones, the rarest are forgotten. The Python standard
# library has 50,000; text without spaces has far more.
MOST_PRETOKENS = 60_000
FEWEST_OCCURRENCES = 2  # a pair that was seen once is not a pattern


def train_bpe(texts: Iterable[str], n_ranks: int, pattern: str) -> dict[bytes, int]:
    """Return at most `n_ranks` tokens and their ranks: the 256 bytes, then merges in their order.

        aaabdaaabac -> aa (seen 4 times), ab (2), aaab (2), and then no pair is seen twice

    `pattern` cuts the texts into pre-tokens, which no token crosses. A tie goes to the pair with
    the smaller ids, as in rustbpe, so that the ranks equal rustbpe's.
    """
    words = Words(count_pretokens(texts, pattern))
    # One entry per pair. Its count may be out of date, but never too low: a merge lowers counts
    # of old pairs, and raises only those of pairs with the new token, which are pushed after it.
    heap = [(-count, pair) for pair, count in words.pair_counts.items()]
    heapq.heapify(heap)

    tokens = [bytes([byte]) for byte in range(256)]
    while heap and len(tokens) < n_ranks:
        count, pair = -heap[0][0], heap[0][1]
        if count != words.pair_counts[pair]:
            heapq.heapreplace(heap, (-words.pair_counts[pair], pair))
            continue
        if count < FEWEST_OCCURRENCES:
            break
        heapq.heappop(heap)
        for new_pair in words.merge(pair, new_token=len(tokens)):
            heapq.heappush(heap, (-words.pair_counts[new_pair], new_pair))
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
    return {token: rank for rank, token in enumerate(tokens)}


def count_pretokens(texts: Iterable[str], pattern: str) -> Counter[str]:
    """Count the distinct pre-tokens: merging each of them once saves walking over the text."""
    find = regex.compile(pattern).finditer
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(m.group() for m in find(text) if m.end() - m.start() <= LONGEST_PRETOKEN)
        if len(counts) > 2 * MOST_PRETOKENS:
            counts = Counter(dict(counts.most_common(MOST_PRETOKENS)))
    return counts


class Words:
    """The distinct pre-tokens as lists of token ids, with their pairs of neighbours counted."""

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
        """Make `pair` one token in all words; return the pairs that this brings about."""
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
        """Add the pairs of word `i` to the counts, or take them out."""
        for pair in pairwise(self.words[i]):
            self.pair_counts[pair] += sign * self.repeats[i]


def merge_pair(word: list[int], pair: Pair, new_token: int) -> list[int]:
    """Return `word` with each `pair`, from the left, made one: [1, 2, 3, 1, 2] -> [4, 3, 4]."""
    merged: list[int] = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new_token
        else:
            merged.append(token)
    return merged
