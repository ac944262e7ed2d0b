"""The files of a prepared dataset.

    train.bin, val.bin    token ids, one after another, little-endian
    tokenizer.tiktoken    the ranks of the tokenizer, if it is a byte-pair encoding
    meta.json             the tokenizer, and the size and SHA-256 of each file

A folder without meta.json is not a dataset.
"""

from pathlib import Path

import numpy as np

import files

FORMAT_VERSION = 1
META = "meta.json"
RANKS = "tokenizer.tiktoken"
SPLITS = ("train", "val")
FEWEST_TOKENS = 2  # in a split: one to predict from, and one to predict


def token_file(split: str) -> str:
    """Return the name of a split's token file: "val" -> "val.bin"."""
    return f"{split}.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest type that holds the ids: two bytes up to 65,536 tokens, else four."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def check_sha256(path: Path, sha256: str) -> None:
    """Raise ValueError if a file does not have this SHA-256."""
    if files.sha256(path) != sha256:
        raise ValueError(f"{path.name} was changed after it was written (its SHA-256 differs)")
