"""Where the windows of an evaluation lie: side by side, around whole texts where these fit."""

from itertools import pairwise

import numpy as np

from data.format import FEWEST_TOKENS


def cut_windows(
    tokens: np.ndarray, context_length: int, end_of_text: int | None
) -> list[tuple[int, int]]:
    """Return the first token that each window reads and, one after its last, the first of the next.

    A window reads context_length tokens. Where texts are shorter than that, on average, it ends
    before the last text that does not fit: without its beginning, what is left of a text would be
    harder to predict than the text is. `[E, a, b, E, c, E, d, e]`, 4 -> [(0, 3), (3, 7)]
    """
    if len(tokens) < FEWEST_TOKENS:
        raise ValueError(f"evaluation needs {FEWEST_TOKENS} tokens: got {len(tokens)}")
    last = len(tokens) - 1  # it is predicted, but nothing is predicted from it
    bounds = list(range(0, last, context_length))
    texts = np.flatnonzero(tokens == end_of_text)
    if len(texts) * context_length > len(tokens):
        bounds = [0]
        while (end := bounds[-1] + context_length) < last:
            begun = int(texts[np.searchsorted(texts, end, side="right") - 1])
            bounds.append(begun if begun > bounds[-1] else end)
    return list(pairwise([*bounds, last]))
