"""The loss to beat: a bigram model, which predicts a token from the one before it alone."""

import numpy as np

STRENGTHS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
MOST_TOKENS = 20_000_000  # of each split, so that the count takes seconds


def bigram_loss(train_T: np.ndarray, val_T: np.ndarray, vocab_size: int) -> float:
    """Mean loss in nats per token of the validation split under counts of the training split.

    p(b | a) = (count(ab) + s p(b)) / (count(a) + s), where p(b) is b's own frequency with one
    added (MacKay & Peto, 1995). s is the best of a few for the validation split itself: the
    comparison favours the bigram model. `[1, 2, 1, 2, 1, 3]` knows p(2 | 1) > p(3 | 1).
    """
    train_T, val_T = (tokens_T[:MOST_TOKENS].astype(np.int64) for tokens_T in (train_T, val_T))
    unigram_V = (np.bincount(train_T, minlength=vocab_size) + 1) / (len(train_T) + vocab_size)
    first_V = np.bincount(train_T[:-1], minlength=vocab_size)
    pairs_P, counts_P = np.unique(train_T[:-1] * vocab_size + train_T[1:], return_counts=True)
    asked_T = val_T[:-1] * vocab_size + val_T[1:]
    found_T = np.searchsorted(pairs_P, asked_T).clip(max=len(pairs_P) - 1)
    count_T = np.where(pairs_P[found_T] == asked_T, counts_P[found_T], 0)
    total_T, own_T = first_V[val_T[:-1]], unigram_V[val_T[1:]]
    return min(-np.log((count_T + s * own_T) / (total_T + s)).mean().item() for s in STRENGTHS)
