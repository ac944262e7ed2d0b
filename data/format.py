"""The files of a prepared dataset.

    train.bin, val.bin    token ids, one after another, little-endian
    tokenizer.tiktoken    the ranks of the tokenizer, if it is a byte-pair encoding
    meta.json             the tokenizer, and the size and SHA-256 of each file

A folder without meta.json is not a dataset. If meta.json names shards (data/shards.py), these are
the token files, and no others are there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import files
from data.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 1
META = "meta.json"
RANKS = "tokenizer.tiktoken"
SPLITS = ("train", "val")
SHARD_HEADER = 1024  # bytes before the tokens
QUICKLY_READ = 200_000_000  # bytes; a file up to this size is checked as a whole when it is opened
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


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError if an id is outside the vocabulary: a GPU would only say "assert"."""
    if ids.max(initial=0) >= vocab_size:
        raise ValueError(f"token {ids.max()} is outside its vocabulary of {vocab_size}")


def check_token_file(path: Path, about: dict[str, Any], header: int, vocab_size: int) -> None:
    """Raise ValueError if a token file is not the one that meta.json describes."""
    dtype = token_dtype(vocab_size)
    expected = header + about["tokens"] * dtype.itemsize
    size = path.stat().st_size
    if size != expected:
        raise ValueError(f"{path.name} should have {expected} bytes, not {size}")
    if size <= QUICKLY_READ:
        check_ids(np.memmap(path, dtype, "r", header), vocab_size)
        check_sha256(path, about["sha256"])


def read_tokenizer(path: Path, state: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that meta.json describes, with its ranks from their own file."""
    if "ranks_sha256" in state:
        check_sha256(path / RANKS, state["ranks_sha256"])
        state = {**state, "ranks": (path / RANKS).read_text(encoding="utf-8")}
    return load_tokenizer(state)


class Joined:
    """Arrays, (N,), read as one: it has the length and the slices of their concatenation."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        parts = [self.arrays[0][:0]]
        for i in range(int(np.searchsorted(self.ends, start, side="right")), len(self.arrays)):
            first = int(self.ends[i]) - len(self.arrays[i])
            if first >= stop:
                break
            parts.append(self.arrays[i][max(0, start - first) : stop - first])
        return np.concatenate(parts)
