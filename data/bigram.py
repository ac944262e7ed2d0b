"""The loss to beat: a bigram model, which predicts each token from the one before it alone."""

import numpy as np

STRENGTHS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
MOST_TOKENS = 20_000_000  # read from each split, so that counting takes seconds


def bigram_loss(train_N: np.ndarray, val_M: np.ndarray, vocab_size: int) -> float:
    """Return the validation loss, in nats per token, of bigram counts of the training split.

    p(b | a) = (count(ab) + s p(b)) / (count(a) + s), where p(b) comes from counts plus one (MacKay
    & Peto, 1995). The strength s is the best of STRENGTHS on the validation split itself, which
    favours the bigram model. `[1, 2, 1, 2, 1, 3]` gives p(2 | 1) > p(3 | 1).
    """
    train_I = train_N[:MOST_TOKENS].astype(np.int64)
    val_J = val_M[:MOST_TOKENS].astype(np.int64)
    unigram_V = (np.bincount(train_I, minlength=vocab_size) + 1) / (len(train_I) + vocab_size)
    first_V = np.bincount(train_I[:-1], minlength=vocab_size)
    pairs_P, counts_P = np.unique(train_I[:-1] * vocab_size + train_I[1:], return_counts=True)

    asked_K = val_J[:-1] * vocab_size + val_J[1:]  # K = J - 1 predictions
    found_K = np.searchsorted(pairs_P, asked_K).clip(max=len(pairs_P) - 1)
    count_K = np.where(pairs_P[found_K] == asked_K, counts_P[found_K], 0)
    total_K = first_V[val_J[:-1]]
    own_K = unigram_V[val_J[1:]]
    return min(-np.log((count_K + s * own_K) / (total_K + s)).mean().item() for s in STRENGTHS)
