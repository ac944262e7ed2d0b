"""The folder of a prepared dataset.

    train.bin, val.bin    token ids, one after another, little-endian
    tokenizer.tiktoken    the ranks of a byte-pair encoding, if that is the tokenizer
    meta.json             the tokenizer, and sizes and SHA-256 of the files

Without meta.json a folder is no dataset.
"""

import hashlib

import numpy as np

FORMAT_VERSION = 1
META = "meta.json"
RANKS = "tokenizer.tiktoken"
SPLITS = ("train", "val")
FEWEST_TOKENS = 2  # of a split: one to predict from, one to predict


def token_file(split: str) -> str:
    """Return the name of the token file of a split."""
    return f"{split}.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest type for the ids of a vocabulary: two bytes up to 65,536 tokens."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def check_sha256(name: str, data: bytes | memoryview, sha256: str) -> None:
    """Raise ValueError if `data` is not what was written."""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{name} was changed after it was written (its SHA-256 differs)")
