"""Cut a text into windows to evaluate: side by side, or along whole texts where these are short."""

from itertools import pairwise

import numpy as np

from data.format import FEWEST_TOKENS


def cut_windows(
    tokens_N: np.ndarray, context_length: int, end_of_text: int | None
) -> list[tuple[int, int]]:
    """Return (start, end) per window: it reads tokens[start:end], and predicts what follows each.

    A window reads at most context_length tokens. If the texts are shorter than that on average,
    a window ends before the last text that does not fit into it: a text that is cut in two is
    harder to predict, because the rest has lost its beginning.
    `[E, a, b, E, c, E, d, e]` with 4 tokens per window -> [(0, 3), (3, 7)]
    """
    if len(tokens_N) < FEWEST_TOKENS:
        raise ValueError(f"evaluation needs {FEWEST_TOKENS} tokens: got {len(tokens_N)}")
    last = len(tokens_N) - 1  # it is predicted, but nothing is predicted from it
    starts = list(range(0, last, context_length))
    texts = np.flatnonzero(tokens_N == end_of_text)
    if len(texts) * context_length > len(tokens_N):
        starts = [0]
        while starts[-1] + context_length < last:
            end = starts[-1] + context_length
            begun = int(texts[np.searchsorted(texts, end, side="right") - 1])
            starts.append(begun if begun > starts[-1] else end)
    return list(pairwise([*starts, last]))
