"""The files of a prepared dataset.

    train.bin, val.bin    token ids, one after another, little-endian
    tokenizer.tiktoken    the ranks of the tokenizer, if it is a byte-pair encoding
    meta.json             the tokenizer, and the size and SHA-256 of each file

A folder without meta.json is not a dataset. If meta.json names shards (data/shards.py), these are
the token files, and no others are there.
"""

import functools
import os
from collections.abc import Callable, Sequence
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
MOST_OPEN = 64  # shards at a time: each takes a file descriptor
FEWEST_TOKENS = 2  # in a split: one to predict from, and one to predict


def token_file(split: str) -> str:
    """Return the name of a split's token file: "val" -> "val.bin"."""
    return f"{split}.bin"


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest type that holds the ids: two bytes up to 65,536 tokens, else four."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def is_dataset(folder: Path) -> bool:
    """Say whether a folder holds a prepared dataset."""
    meta = folder / META
    return meta.is_file() and b'"format_version"' in meta.read_bytes()


def check_sha256(path: Path, sha256: str) -> None:
    """Raise ValueError if a file does not have this SHA-256."""
    if files.sha256(path) != sha256:
        raise ValueError(f"{path.name} was changed after it was written (its SHA-256 differs)")


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError if an id is outside the vocabulary: a GPU would only say "assert"."""
    if ids.max(initial=0) >= vocab_size:
        raise ValueError(f"token {ids.max()} is outside its vocabulary of {vocab_size}")


class TokenFiles:
    """Maps the token files of a dataset into memory, and compares them with what it says of them.

    `about` is the part of meta.json on a file.
    """

    def __init__(self, folder: Path, vocab_size: int, header: int) -> None:
        """`header` is the number of bytes before the ids in a file."""
        self.folder, self.vocab_size, self.header = folder, vocab_size, header
        self.dtype = token_dtype(vocab_size)
        self.checked: set[Path] = set()
        self.opened: dict[Path, tuple[os.stat_result, str]] = {}  # as it was then, and its SHA-256
        # So a file stays as it was if, while a run reads it, it is removed or replaced
        open_file = functools.partial(np.memmap, dtype=self.dtype, mode="r", offset=self.header)
        self.map = functools.lru_cache(MOST_OPEN)(open_file)

    def check_size(self, path: Path, about: dict[str, Any]) -> None:
        expected = self.header + about["tokens"] * self.dtype.itemsize
        found = path.stat()
        if found.st_size != expected:
            raise ValueError(f"{path.name} should have {expected} bytes, not {found.st_size}")
        self.opened[path] = found, about["sha256"]

    def check_content(self, path: Path, about: dict[str, Any]) -> None:
        check_ids(self.map(path), self.vocab_size)
        check_sha256(path, about["sha256"])

    def check_and_map(self, path: Path, about: dict[str, Any]) -> np.ndarray:
        """Map a file. Raises ValueError at the first time if its content has changed."""
        if path not in self.checked:
            try:
                self.check_content(path, about)
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.folder} is damaged: {error}; prepare it again") from error
            self.checked.add(path)
        return self.map(path)

    def check_unchanged(self) -> None:
        """Raise ValueError if a file was written to since it was opened.

        Where it was removed or replaced, the map is still of the one that was opened.
        """
        for path, (before, sha256) in self.opened.items():
            now = path.stat() if path.exists() else before
            if os.path.samestat(now, before) and now.st_mtime_ns != before.st_mtime_ns:
                if files.sha256(path) != sha256:
                    raise ValueError(
                        f"{path} was changed while a run read it, so no loss can be repeated: "
                        "prepare the dataset again, and go on from the last checkpoint by --resume"
                    )
                self.opened[path] = now, sha256


def read_tokenizer(path: Path, state: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that meta.json describes, with its ranks from their own file."""
    if "ranks_sha256" in state:
        check_sha256(path / RANKS, state["ranks_sha256"])
        state = {**state, "ranks": (path / RANKS).read_text(encoding="utf-8")}
    return load_tokenizer(state)


class Joined:
    """Arrays, (N,), read as one: it has the length and the slices of their concatenation.

    Array i is what `get` returns; it is asked for when a slice needs it.
    """

    def __init__(self, lengths: Sequence[int], get: Callable[[int], np.ndarray]):
        self.get = get
        self.ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, _ = where.indices(len(self))
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        if stop <= start:
            return self.get(0)[:0]
        begins = np.concatenate([[0], self.ends])
        parts = [
            self.get(i)[max(0, start - begins[i]) : stop - begins[i]]
            for i in range(first, last + 1)
        ]
        return np.concatenate(parts)
