"""The order in which a run sees its windows: a shuffle for each epoch, from the seed alone."""

from typing import Literal

import numpy as np

MOST_HELD = 2**20  # windows whose order is held in memory: 8 MB
ROUNDS = 4
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: it parts neighbours

Kind = Literal["held", "computed"]


class Order:
    """Shuffles `n` windows anew in each epoch, and shifts their grid by up to `n_offsets` tokens.

    Up to MOST_HELD windows a permutation is held. Of more, each place is computed when it is asked
    for: 100 billion tokens would take an array of 800 MB in every process.
    """

    def __init__(self, n: int, n_offsets: int, seed: int) -> None:
        self.n, self.n_offsets, self.seed = n, n_offsets, seed
        self.kind: Kind = "held" if n <= MOST_HELD else "computed"
        self.epoch = -1

    def windows(self, samples_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the window of each sample, counted over the run, and its offset in tokens."""
        epochs_B, places_B = np.divmod(samples_B, self.n)
        windows_B, offsets_B = np.empty_like(samples_B), np.empty_like(samples_B)
        for epoch in np.unique(epochs_B).tolist():
            if epoch != self.epoch:
                self._begin(epoch)
            now_B = epochs_B == epoch
            offsets_B[now_B] = self.offset
            if self.kind == "held":
                windows_B[now_B] = self.permutation_N[places_B[now_B]]
            else:
                windows_B[now_B] = shuffled(places_B[now_B], self.n, self.keys)
        return windows_B, offsets_B

    def _begin(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        self.epoch, self.offset = epoch, int(rng.integers(self.n_offsets))
        if self.kind == "held":
            self.permutation_N = rng.permutation(self.n)
        else:
            self.keys = rng.integers(2**64, size=ROUNDS, dtype=np.uint64)


def shuffled(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Return where a shuffle of 0 to n - 1 puts each place, without holding the shuffle.

    A Feistel network changes one half of a number by a function of the other. It can be undone, so
    it is a bijection whatever the function (Luby & Rackoff, 1988), here of all numbers that two
    halves make. What falls outside of n goes through it again until it falls inside (Black &
    Rogaway, 2002, sec. 3): at most four times on average.
    """
    bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(bits)) - 1)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        left, right = found[outside] >> bits, found[outside] & low
        for key in keys:
            mixed = (right + key) * MULTIPLIER
            mixed ^= mixed >> np.uint64(32)
            mixed = (mixed * MULTIPLIER) >> np.uint64(32)
            left, right = right, left ^ (mixed & low)
        found[outside] = (left << bits) | right
        outside = found >= n
    return found.astype(np.int64)
